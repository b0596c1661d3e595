"""Published models as ModelConfigs: decoders.

A preset states what it differs in from its base: an older model with the same code, where there is one.
"""

from dataclasses import replace

from jaxllm.models.config import ModelConfig, RopeScaling
from jaxllm.models.presets_encoders import (  # noqa: F401
  bart_base,
  bert_base,
  flan_t5_small,
  modernbert_base,
  roberta_base,
  t5_small,
)


def gpt2_124m() -> ModelConfig:
  """GPT-2 small: Radford et al. 2019, table 2, row 1 (117M there, 124M by count)."""
  return ModelConfig(
    vocab_size=50257,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    max_seq_len=1024,
    position="learned",
    norm="layernorm",
    mlp="gelu_tanh",
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
  )


def gpt3_small() -> ModelConfig:
  """GPT-3 Small, 125M: Brown et al., arXiv 2005.14165, table 2.1, row 1 (all layers dense)."""
  return replace(gpt2_124m(), max_seq_len=2048)


def pythia_160m() -> ModelConfig:
  """Pythia 160M: arXiv 2304.01373, table 1, and config.json of EleutherAI/pythia-160m."""
  gpt2 = replace(gpt2_124m(), vocab_size=50304, max_seq_len=2048, mlp="gelu", tie_embeddings=False)
  return replace(gpt2, position="rope", rope_fraction=0.25, parallel_residual=True)


def bloom_560m() -> ModelConfig:
  """BLOOM 560M: arXiv 2211.05100, table 3, and config.json of bigscience/bloom-560m."""
  gpt2 = replace(gpt2_124m(), vocab_size=250880, embed_dim=1024, num_layers=24, mlp_dim=4096, max_seq_len=2048)
  return replace(gpt2, num_heads=16, num_kv_heads=16, position="alibi", embedding_norm=True)


def llama2_7b() -> ModelConfig:
  """Llama 2 7B: Touvron et al., arXiv 2307.09288, table 1 and config.json of meta-llama/Llama-2-7b-hf."""
  return ModelConfig(
    vocab_size=32000,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    mlp_dim=11008,
    max_seq_len=4096,
    tie_embeddings=False,
  )


def llama3_8b() -> ModelConfig:
  """Llama 3 8B: arXiv 2407.21783, table 3 (as released in April 2024, context 8192)."""
  sizes = dict(vocab_size=128256, num_kv_heads=8, mlp_dim=14336, max_seq_len=8192)
  return replace(llama2_7b(), **sizes, rope_theta=500000.0)


def llama_1b() -> ModelConfig:
  """Llama 3.2 1B: config.json of meta-llama/Llama-3.2-1B."""
  sizes = dict(embed_dim=2048, num_layers=16, head_dim=64, mlp_dim=8192, max_seq_len=131072)
  scaling = RopeScaling("llama3", factor=32.0, original_max_seq_len=8192)
  return replace(llama3_8b(), **sizes, rope_scaling=scaling, tie_embeddings=True)


def mistral_7b() -> ModelConfig:
  """Mistral 7B v0.1: Jiang et al., arXiv 2310.06825, table 1, and its config.json (window 4096)."""
  return replace(llama2_7b(), num_kv_heads=8, mlp_dim=14336, max_seq_len=32768, sliding_window=4096)


def phi3_mini() -> ModelConfig:
  """Phi-3 mini, 4k: arXiv 2404.14219, section 2, and config.json of microsoft/Phi-3-mini-4k-instruct."""
  return replace(llama2_7b(), vocab_size=32064, embed_dim=3072, head_dim=96, mlp_dim=8192, sliding_window=2047)


def olmo2_1b() -> ModelConfig:
  """OLMo 2 1B: arXiv 2501.00656, and config.json of allenai/OLMo-2-0425-1B."""
  sizes = dict(vocab_size=100352, embed_dim=2048, num_layers=16, num_heads=16, num_kv_heads=16, mlp_dim=8192)
  norms = dict(qk_norm="full", norm_eps=1e-6, norm_placement="output")
  return replace(llama2_7b(), **sizes, **norms, rope_theta=500000.0)


def smollm2_135m() -> ModelConfig:
  """SmolLM2 135M: arXiv 2502.02737, and config.json of HuggingFaceTB/SmolLM2-135M."""
  return ModelConfig(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    max_seq_len=8192,
    rope_theta=100000.0,
  )


def smollm3_3b() -> ModelConfig:
  """SmolLM3 3B: config.json of HuggingFaceTB/SmolLM3-3B."""
  return ModelConfig(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=4,
    mlp_dim=11008,
    max_seq_len=65536,
    layer_pattern=("global", "global", "global", "nope"),
    norm_eps=1e-6,
    rope_theta=5000000.0,
  )


def qwen2_0_5b() -> ModelConfig:
  """Qwen2 0.5B: arXiv 2407.10671, table 1, and config.json of Qwen/Qwen2-0.5B."""
  return ModelConfig(
    vocab_size=151936,
    embed_dim=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    mlp_dim=4864,
    max_seq_len=131072,
    attention_bias=True,
    norm_eps=1e-6,
    rope_theta=1000000.0,
  )


def qwen3_0_6b() -> ModelConfig:
  """Qwen3 0.6B: arXiv 2505.09388, table 1, and config.json of Qwen/Qwen3-0.6B."""
  sizes = dict(embed_dim=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=3072)
  return replace(qwen2_0_5b(), **sizes, max_seq_len=40960, attention_bias=False, qk_norm="head")


def gemma_2b() -> ModelConfig:
  """Gemma 2B: arXiv 2403.08295, table 1, and config.json of google/gemma-2b."""
  return ModelConfig(
    vocab_size=256000,
    embed_dim=2048,
    num_layers=18,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    mlp_dim=16384,
    max_seq_len=8192,
    mlp="geglu_tanh",
    norm_eps=1e-6,
    norm_unit_offset=True,
    embedding_scale=2048**0.5,
  )


def gemma2_2b() -> ModelConfig:
  """Gemma 2 2B: arXiv 2408.00118, table 1, and config.json of google/gemma-2-2b."""
  return replace(
    gemma_2b(),
    embed_dim=2304,
    num_layers=26,
    num_kv_heads=4,
    mlp_dim=9216,
    norm_placement="sandwich",
    query_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    sliding_window=4096,
    layer_pattern=("local", "global"),
    embedding_scale=2304**0.5,
  )


def gemma3_1b() -> ModelConfig:
  """Gemma 3 1B: arXiv 2503.19786, table 1, and config.json of google/gemma-3-1b-pt."""
  return replace(
    gemma_2b(),
    vocab_size=262144,
    embed_dim=1152,
    num_layers=26,
    num_heads=4,
    mlp_dim=6912,
    max_seq_len=32768,
    qk_norm="head",
    norm_placement="sandwich",
    sliding_window=512,
    layer_pattern=("local",) * 5 + ("global",),
    rope_theta=1000000.0,
    rope_local_theta=10000.0,
    embedding_scale=1152**0.5,
  )


def gemma3_270m() -> ModelConfig:
  """Gemma 3 270M: config.json of google/gemma-3-270m."""
  return replace(gemma3_1b(), embed_dim=640, num_layers=18, mlp_dim=2048, embedding_scale=640**0.5)

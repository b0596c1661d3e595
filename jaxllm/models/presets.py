"""Published models as ModelConfigs."""

from jaxllm.models.config import ModelConfig, RopeScaling


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
  return ModelConfig(
    vocab_size=50257,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    max_seq_len=2048,
    position="learned",
    norm="layernorm",
    mlp="gelu_tanh",
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
  )


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
  return ModelConfig(
    vocab_size=128256,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    max_seq_len=8192,
    rope_theta=500000.0,
    tie_embeddings=False,
  )


def llama_1b() -> ModelConfig:
  """Llama 3.2 1B: config.json of meta-llama/Llama-3.2-1B."""
  return ModelConfig(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=8192,
    max_seq_len=131072,
    rope_theta=500000.0,
    rope_scaling=RopeScaling("llama3", factor=32.0, original_max_seq_len=8192),
  )


def mistral_7b() -> ModelConfig:
  """Mistral 7B v0.1: Jiang et al., arXiv 2310.06825, table 1, and its config.json (window 4096)."""
  return ModelConfig(
    vocab_size=32000,
    embed_dim=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    max_seq_len=32768,
    sliding_window=4096,
    tie_embeddings=False,
  )


def qwen3_0_6b() -> ModelConfig:
  """Qwen3 0.6B: arXiv 2505.09388, table 1, and config.json of Qwen/Qwen3-0.6B."""
  return ModelConfig(
    vocab_size=151936,
    embed_dim=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    mlp_dim=3072,
    max_seq_len=40960,
    qk_norm="head",
    norm_eps=1e-6,
    rope_theta=1000000.0,
  )


def gemma2_2b() -> ModelConfig:
  """Gemma 2 2B: arXiv 2408.00118, table 1, and config.json of google/gemma-2-2b."""
  return ModelConfig(
    vocab_size=256000,
    embed_dim=2304,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_dim=9216,
    max_seq_len=8192,
    mlp="geglu_tanh",
    norm_eps=1e-6,
    norm_placement="sandwich",
    norm_unit_offset=True,
    query_scale=256**-0.5,
    attention_softcap=50.0,
    logit_softcap=30.0,
    sliding_window=4096,
    layer_pattern=("local", "global"),
    embedding_scale=2304**0.5,
  )

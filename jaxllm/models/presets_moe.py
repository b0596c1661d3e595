"""Published models with experts, as ModelConfigs."""

from dataclasses import replace

from jaxllm.models.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from jaxllm.models.presets import mistral_7b, qwen3_0_6b


def mixtral_8x7b() -> ModelConfig:
  """Mixtral 8x7B v0.1: Jiang et al., arXiv 2401.04088, table 1, and config.json of mistralai/Mixtral-8x7B-v0.1."""
  moe = MoEConfig(num_experts=8, top_k=2, load_balance_weight=0.02)
  return replace(mistral_7b(), sliding_window=None, rope_theta=1000000.0, moe=moe)


def qwen3_30b_a3b() -> ModelConfig:
  """Qwen3 30B-A3B: arXiv 2505.09388, table 2, and config.json of Qwen/Qwen3-30B-A3B."""
  sizes = dict(embed_dim=2048, num_layers=48, num_heads=32, num_kv_heads=4, mlp_dim=6144)
  moe = MoEConfig(num_experts=128, top_k=8, mlp_dim=768, load_balance_weight=0.001)
  return replace(qwen3_0_6b(), **sizes, moe=moe, tie_embeddings=False)


def deepseek_v2_lite() -> ModelConfig:
  """DeepSeek-V2-Lite: arXiv 2405.04434, appendix B, and config.json of deepseek-ai/DeepSeek-V2-Lite."""
  return ModelConfig(
    vocab_size=102400,
    embed_dim=2048,
    num_layers=27,
    num_heads=16,
    mlp_dim=10944,
    max_seq_len=163840,
    norm_eps=1e-6,
    rope_scaling=RopeScaling("yarn", 40.0, 4096, attention_factor=1.0, mscale_all_dim=0.707),
    mla=MLAConfig(kv_lora_rank=512, nope_head_dim=128, rope_head_dim=64, value_head_dim=128),
    moe=MoEConfig(
      num_experts=64, top_k=6, mlp_dim=1408, shared_mlp_dim=2 * 1408, first_dense_layers=1, normalize=False
    ),
    tie_embeddings=False,
  )


def deepseek_v3() -> ModelConfig:
  """DeepSeek-V3: arXiv 2412.19437, section 4.2, and config.json of deepseek-ai/DeepSeek-V3 (without the layer
  that predicts one more token)."""
  return replace(
    deepseek_v2_lite(),
    vocab_size=129280,
    embed_dim=7168,
    num_layers=61,
    num_heads=128,
    num_kv_heads=128,
    mlp_dim=18432,
    rope_scaling=RopeScaling("yarn", 40.0, 4096, attention_factor=1.0, mscale_all_dim=1.0),
    mla=MLAConfig(kv_lora_rank=512, q_lora_rank=1536, nope_head_dim=128, rope_head_dim=64, value_head_dim=128),
    moe=MoEConfig(
      num_experts=256,
      top_k=8,
      mlp_dim=2048,
      shared_mlp_dim=2048,
      first_dense_layers=3,
      scoring="sigmoid",
      correction_bias=True,
      scale=2.5,
      num_groups=8,
      top_groups=4,
    ),
  )

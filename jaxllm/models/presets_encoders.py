"""Published encoders and encoder-decoders as ModelConfigs."""

from dataclasses import replace

from jaxllm.models.config import ModelConfig


def bert_base() -> ModelConfig:
  """BERT base, uncased: Devlin et al., arXiv 1810.04805, section 3, with its masked-LM head."""
  return ModelConfig(
    architecture="encoder",
    vocab_size=30522,
    embed_dim=768,
    num_layers=12,
    num_heads=12,
    max_seq_len=512,
    num_token_types=2,
    position="learned",
    norm="layernorm",
    norm_eps=1e-12,
    norm_placement="post",
    embedding_norm=True,
    final_norm=False,
    mlp="gelu",
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    head_bias=True,
    head_dense="gelu",
    head_norm=True,
    init="normal",
  )


def roberta_base() -> ModelConfig:
  """RoBERTa base: Liu et al., arXiv 1907.11692, appendix B, and config.json of FacebookAI/roberta-base."""
  return replace(bert_base(), vocab_size=50265, num_token_types=1, norm_eps=1e-5, position_offset=2, position_pad_id=1)


def modernbert_base() -> ModelConfig:
  """ModernBERT base: Warner et al., arXiv 2412.13663, table 3, and config.json of answerdotai/ModernBERT-base."""
  return ModelConfig(
    architecture="encoder",
    vocab_size=50368,
    embed_dim=768,
    num_layers=22,
    num_heads=12,
    mlp_dim=1152,
    max_seq_len=8192,
    mlp="geglu",
    norm="layernorm",
    norm_bias=False,
    embedding_norm=True,
    first_norm=False,
    sliding_window=65,  # 64 tokens to either side
    layer_pattern=("global", "local", "local"),
    rope_theta=160000.0,
    rope_local_theta=10000.0,
    head_bias=True,
    head_dense="gelu",
    head_norm=True,
  )


def t5_small() -> ModelConfig:
  """T5 small: Raffel et al., arXiv 1910.10683, section 3.7, and config.json of google-t5/t5-small."""
  return ModelConfig(
    architecture="encoder_decoder",
    vocab_size=32128,
    embed_dim=512,
    num_layers=6,
    num_heads=8,
    head_dim=64,
    mlp_dim=2048,
    max_seq_len=512,
    mlp="relu",
    position="relative",
    query_scale=1.0,
    norm_eps=1e-6,
    logit_scale=512**-0.5,
    init="fan_in",
  )


def flan_t5_small() -> ModelConfig:
  """FLAN-T5 small: Chung et al., arXiv 2210.11416, and config.json of google/flan-t5-small (a T5 1.1)."""
  sizes = dict(num_layers=8, num_encoder_layers=8, num_heads=6, num_kv_heads=6, mlp_dim=1024)
  return replace(t5_small(), **sizes, mlp="geglu_tanh", logit_scale=None, tie_embeddings=False)


def bart_base() -> ModelConfig:
  """BART base: Lewis et al., arXiv 1910.13461, and config.json of facebook/bart-base."""
  return replace(
    roberta_base(),
    architecture="encoder_decoder",
    num_layers=6,
    max_seq_len=1024,
    position_pad_id=None,
    num_token_types=0,
    decoder_start_id=2,
    head_dense=None,
    head_norm=False,
  )

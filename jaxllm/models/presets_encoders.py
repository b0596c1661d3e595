"""Published encoders and encoder-decoders as ModelConfigs."""

from jaxllm.models.config import ModelConfig

_BERT = dict(
  architecture="encoder",
  embed_dim=768,
  num_layers=12,
  num_heads=12,
  max_seq_len=512,
  position="learned",
  norm="layernorm",
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


def bert_base() -> ModelConfig:
  """BERT base, uncased: Devlin et al., arXiv 1810.04805, section 3, with its masked-LM head."""
  return ModelConfig(vocab_size=30522, num_token_types=2, norm_eps=1e-12, **_BERT)


def roberta_base() -> ModelConfig:
  """RoBERTa base: Liu et al., arXiv 1907.11692, appendix B, and config.json of FacebookAI/roberta-base."""
  return ModelConfig(vocab_size=50265, num_token_types=1, position_offset=2, **_BERT)


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


_T5_SMALL = dict(
  architecture="encoder_decoder",
  vocab_size=32128,
  embed_dim=512,
  head_dim=64,
  max_seq_len=512,
  position="relative",
  query_scale=1.0,
  norm_eps=1e-6,
  init="fan_in",
)


def t5_small() -> ModelConfig:
  """T5 small: Raffel et al., arXiv 1910.10683, section 3.7, and config.json of google-t5/t5-small."""
  return ModelConfig(num_layers=6, num_heads=8, mlp_dim=2048, mlp="relu", logit_scale=512**-0.5, **_T5_SMALL)


def flan_t5_small() -> ModelConfig:
  """FLAN-T5 small: Chung et al., arXiv 2210.11416, and config.json of google/flan-t5-small (a T5 1.1)."""
  return ModelConfig(num_layers=8, num_heads=6, mlp_dim=1024, mlp="geglu_tanh", tie_embeddings=False, **_T5_SMALL)


def bart_base() -> ModelConfig:
  """BART base: Lewis et al., arXiv 1910.13461, and config.json of facebook/bart-base."""
  return ModelConfig(
    architecture="encoder_decoder",
    vocab_size=50265,
    embed_dim=768,
    num_layers=6,
    num_heads=12,
    mlp_dim=3072,
    max_seq_len=1024,
    decoder_start_id=2,
    position="learned",
    position_offset=2,
    norm="layernorm",
    norm_placement="post",
    embedding_norm=True,
    final_norm=False,
    mlp="gelu",
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    head_bias=True,
    init="normal",
  )

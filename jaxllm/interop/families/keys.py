"""What config.json of Hugging Face may say: every key that a family reads, and its type.

A key that is declared neither here nor in the family's `types` cannot be read: `Declared` has no other.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypedDict, get_type_hints

from jaxllm.base.errors import ConfigError
from jaxllm.base.strangers import Count, Layers, NotNegative, Positive, Real, Size, Whole, declared


class Rope(TypedDict, total=False):
  """`rope_scaling`, `rope_parameters`, or one of the kinds in it."""

  rope_type: str
  type: str
  rope_theta: Positive
  partial_rotary_factor: Positive
  factor: Positive
  low_freq_factor: Positive
  high_freq_factor: Positive
  original_max_position_embeddings: Size
  beta_fast: Positive
  beta_slow: Positive
  attention_factor: Positive
  mscale: NotNegative
  mscale_all_dim: NotNegative
  truncate: bool
  short_factor: list[Positive]
  long_factor: list[Positive]
  full_attention: "Rope"
  sliding_attention: "Rope"


class Keys(TypedDict, total=False):
  """Keys of all families. A null stands for the default, but where the type has None."""

  model_type: str
  architectures: list[str]
  id2label: dict[str, Any]
  # Sizes
  vocab_size: Size
  hidden_size: Size
  d_model: Size
  n_embd: Size
  num_hidden_layers: Layers
  n_layer: Layers
  num_layers: Layers
  num_decoder_layers: Layers
  decoder_layers: Layers
  encoder_layers: Layers
  num_attention_heads: Size
  n_head: Size
  num_heads: Size
  decoder_attention_heads: Size
  encoder_attention_heads: Size
  num_key_value_heads: Size | None
  head_dim: Size | None
  d_kv: Size
  intermediate_size: Size
  n_inner: Size | None
  d_ff: Size
  decoder_ffn_dim: Size
  encoder_ffn_dim: Size
  max_position_embeddings: Size
  n_positions: Size
  seq_length: Size
  type_vocab_size: Count
  # Norms, activations, embeddings
  rms_norm_eps: Real
  layer_norm_eps: Real
  layer_norm_epsilon: Real
  norm_eps: Real
  norm_bias: bool
  hidden_act: str
  hidden_activation: str
  activation_function: str
  feed_forward_proj: str
  dense_act_fn: str
  is_gated_act: bool
  attention_bias: bool
  mlp_bias: bool
  tie_word_embeddings: bool
  scale_embedding: bool
  scale_decoder_outputs: bool
  use_parallel_residual: bool
  initializer_range: Real
  init_std: Real
  decoder_start_token_id: Count
  pad_token_id: Whole
  # Heads
  classifier_activation: str
  classifier_bias: bool
  classifier_pooling: str
  decoder_bias: bool
  # Positions and windows
  rope_theta: Positive
  rope_scaling: Rope | None
  rope_parameters: Rope | None
  rope_local_base_freq: Positive
  partial_rotary_factor: Positive
  rotary_emb_base: Positive
  rotary_pct: Positive
  global_rope_theta: Positive
  local_rope_theta: Positive
  relative_attention_num_buckets: Size
  relative_attention_max_distance: Size
  query_pre_attn_scalar: Positive
  attn_logit_softcapping: Positive | None
  final_logit_softcapping: Positive | None
  sliding_window: Size | None
  sliding_window_pattern: Size
  use_sliding_window: bool
  max_window_layers: Count
  layer_types: list[str] | None
  local_attention: Count
  global_attn_every_n_layers: Size
  no_rope_layer_interval: Size
  no_rope_layers: list[Whole | bool] | None
  # Experts and latent attention
  num_local_experts: Size
  num_experts: Size
  n_routed_experts: Size
  num_experts_per_tok: Size
  moe_intermediate_size: Size
  n_shared_experts: Count
  n_group: Count | None
  topk_group: Count | None
  topk_method: str
  norm_topk_prob: bool
  routed_scaling_factor: Positive
  first_k_dense_replace: Count
  decoder_sparse_step: Size
  mlp_only_layers: list[Count] | None
  router_aux_loss_coef: Real
  kv_lora_rank: Size
  q_lora_rank: Size | None
  qk_nope_head_dim: Size
  qk_rope_head_dim: Size
  v_head_dim: Size
  # Of the families that came later
  logit_scale: Positive | None
  norm_epsilon: Real
  use_bias: bool
  bos_token_id: Whole | None
  num_labels: Count
  use_qk_norm: bool
  ffn_dim: Size
  word_embed_proj_dim: Size | None
  do_layer_norm_before: bool
  enable_bias: bool
  layer_norm_elementwise_affine: bool
  clip_qkv: Positive | None
  _remove_final_layer_norm: bool
  new_decoder_architecture: bool
  num_kv_heads: Size | None
  alibi: bool
  multi_query: bool
  parallel_attn: bool
  bias: bool
  num_ln_in_parallel_attn: Count | None
  ffn_hidden_size: Size | None
  activation: str
  rotary_dim: Size
  embedding_multiplier: Real
  residual_multiplier: Real
  logits_scaling: Positive
  attention_multiplier: Positive
  dim: Size
  hidden_dim: Size
  n_layers: Layers
  n_heads: Size
  embedding_size: Size
  relative_attention: bool
  share_att_key: bool
  norm_rel_ebd: str
  conv_kernel_size: Count
  conv_act: str
  conv_groups: Count
  pos_att_type: list[str] | str | None
  position_buckets: Whole
  max_relative_positions: Whole
  position_biased_input: bool
  pooler_hidden_act: str
  swiglu_limit: Positive
  swiglu_alpha: Positive
  original_max_position_embeddings: Size


class Declared(dict):
  """What config.json says of declared keys, and a family's defaults of those that it does not say.

  Attributes:
    asked: the keys that were looked up.
  """

  def __init__(self, values: Mapping[str, Any], known: Collection[str], asked: set[str] | None = None):
    super().__init__(values)
    self.known, self.asked = known, set() if asked is None else asked

  def __getitem__(self, key):
    self.asked.add(key)
    return super().__getitem__(key)

  def __missing__(self, key):
    self._check(key)
    raise ConfigError(f"config.json lacks {key!r}, which a {dict.get(self, 'model_type', 'Hugging Face')} model needs")

  def get(self, key, default=None):
    self._check(key)
    return super().get(key, default)

  def __or__(self, other):
    return Declared({**self, **other}, self.known, self.asked)

  def _check(self, key: str) -> None:
    self.asked.add(key)
    assert key in self.known, f"the key {key} is read but not declared"


def read_keys(config: Mapping[str, Any], defaults: Mapping[str, Any], own: Mapping[str, Any]) -> Declared:
  """A config.json's declared keys.

  Args:
    own: key -> type of keys that only this family has.

  Raises:
    ConfigError: a value is of another type than declared, or outside its range.
  """
  kind = TypedDict("kind", {**get_type_hints(Keys, include_extras=True), **own}, total=False)  # type: ignore[misc]
  known = kind.__annotations__.keys()
  given = {key: value for key, value in defaults.items() if key in known}  # classes of transformers have others too
  return Declared({**given, **declared(kind, config, "config.json")}, known)

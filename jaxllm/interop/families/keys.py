"""What config.json of Hugging Face may say: every key that a family reads, and its type.

A key that is not declared here cannot be read: `Declared` has no other.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypedDict

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


# Type -> the keys that have it, of all families. A null stands for the default, but where the type has None.
_KEYS: dict[Any, str] = {
  str: """
    activation activation_function classifier_activation classifier_pooling conv_act dense_act_fn feed_forward_proj
    hidden_act hidden_activation model_type norm_rel_ebd pooler_hidden_act topk_method
  """,
  list[str]: "architectures",
  dict[str, Any]: "id2label",
  bool: """
    alibi attention_bias bias classifier_bias decoder_bias do_layer_norm_before enable_bias is_encoder_decoder
    is_gated_act layer_norm_elementwise_affine mlp_bias multi_query new_decoder_architecture norm_bias norm_topk_prob
    parallel_attn position_biased_input relative_attention _remove_final_layer_norm scale_decoder_outputs
    scale_embedding share_att_key tie_word_embeddings use_bias use_parallel_residual use_qk_norm use_sliding_window
  """,
  Layers: "decoder_layers encoder_layers n_layer n_layers num_decoder_layers num_hidden_layers num_layers",
  Size: """
    d_ff d_kv d_model decoder_attention_heads decoder_ffn_dim decoder_sparse_step dim embedding_size
    encoder_attention_heads encoder_ffn_dim ffn_dim global_attn_every_n_layers hidden_dim hidden_size
    intermediate_size kv_lora_rank max_position_embeddings moe_intermediate_size n_embd n_head n_heads n_positions
    n_routed_experts no_rope_layer_interval num_attention_heads num_experts num_experts_per_tok num_heads
    num_local_experts original_max_position_embeddings qk_nope_head_dim qk_rope_head_dim
    relative_attention_max_distance relative_attention_num_buckets rotary_dim seq_length sliding_window_pattern
    v_head_dim vocab_size
  """,
  Size | None: """
    ffn_hidden_size head_dim n_inner num_key_value_heads num_kv_heads q_lora_rank sliding_window word_embed_proj_dim
  """,
  Count: """
    conv_groups conv_kernel_size decoder_start_token_id first_k_dense_replace local_attention max_window_layers
    n_shared_experts num_labels type_vocab_size
  """,
  Count | None: "n_group num_ln_in_parallel_attn topk_group",
  Whole: "max_relative_positions pad_token_id position_buckets",
  Whole | None: "bos_token_id",
  Real: """
    embedding_multiplier init_std initializer_range layer_norm_eps layer_norm_epsilon norm_eps norm_epsilon
    residual_multiplier rms_norm_eps router_aux_loss_coef
  """,
  Positive: """
    attention_multiplier global_rope_theta local_rope_theta logits_scaling partial_rotary_factor
    query_pre_attn_scalar rope_local_base_freq rope_theta rotary_emb_base rotary_pct routed_scaling_factor
    swiglu_alpha swiglu_limit
  """,
  Positive | None: "attn_logit_softcapping clip_qkv final_logit_softcapping logit_scale",
  Rope | None: "rope_parameters rope_scaling",
  list[str] | None: "layer_types",
  list[str] | str | None: "pos_att_type",
  list[Count] | None: "mlp_only_layers",
  list[Whole | bool] | None: "no_rope_layers",
}
_TYPES = {key: kind for kind, keys in _KEYS.items() for key in keys.split()}
Keys = TypedDict("Keys", _TYPES, total=False)  # type: ignore[misc]


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


def read_keys(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> Declared:
  """A config.json's declared keys.

  Raises:
    ConfigError: a value is of another type than declared, or outside its range.
  """
  given = {key: value for key, value in defaults.items() if key in _TYPES}  # classes of transformers have others too
  return Declared({**given, **declared(Keys, config, "config.json")}, _TYPES)

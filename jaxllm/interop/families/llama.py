"""Llama, and the families that are Llama with a few settings of their own: Mistral, Qwen 2, Qwen 3."""

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

KEYS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_dim": "intermediate_size",
  "max_seq_len": "max_position_embeddings",
  "norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
  "init_std": "initializer_range",
}
DEFAULTS = {
  "num_key_value_heads": None,
  "head_dim": None,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "initializer_range": 0.02,
  "attention_bias": False,
  "mlp_bias": False,
  "hidden_act": "silu",
}

LAYER = "model.layers.{layer}"
WEIGHTS = (
  t.embedding("embedding/tokens", "model.embed_tokens"),
  *t.linear("blocks/attention/query", f"{LAYER}.self_attn.q_proj"),
  *t.linear("blocks/attention/key", f"{LAYER}.self_attn.k_proj"),
  *t.linear("blocks/attention/value", f"{LAYER}.self_attn.v_proj"),
  *t.linear("blocks/attention/output", f"{LAYER}.self_attn.o_proj"),
  *t.norm("blocks/attention/query_norm", f"{LAYER}.self_attn.q_norm"),
  *t.norm("blocks/attention/key_norm", f"{LAYER}.self_attn.k_norm"),
  *t.linear("blocks/mlp/gate", f"{LAYER}.mlp.gate_proj"),
  *t.linear("blocks/mlp/up", f"{LAYER}.mlp.up_proj"),
  *t.linear("blocks/mlp/down", f"{LAYER}.mlp.down_proj"),
  *t.norm("final_norm", "model.norm"),
  *t.linear("head", "lm_head"),
)
PRE_NORMS = (
  *t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
  *t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
)


def read(hf):
  """The fields of a Llama whose attention_bias is on all four projections."""
  bias = hf["attention_bias"]
  biases = {"attention_bias": bias, "attention_out_bias": bias, "mlp_bias": hf["mlp_bias"]}
  return read_rope(hf) | biases | {"mlp": t.mlp_name(hf["hidden_act"], gated=True)}


def write(c):
  hf = write_rope(c) | {"attention_bias": c.attention_bias, "hidden_act": t.activation_name(c.mlp)}
  return hf | ({"mlp_bias": True} if c.mlp_bias else {})


def read_mistral(hf):
  return read(hf | {"attention_bias": False}) | {"sliding_window": hf.get("sliding_window")}


def write_mistral(c):
  return write_rope(c) | {"hidden_act": t.activation_name(c.mlp), "sliding_window": c.sliding_window}


def _read_qwen(hf):
  """Qwen's window: of the layers from `max_window_layers` on, or of those that `layer_types` names."""
  fields = read(hf)
  if hf.get("use_sliding_window") and hf.get("sliding_window"):
    first = hf.get("max_window_layers", 28)
    layers = range(hf["num_hidden_layers"])
    types = ["sliding_attention" if i >= first else "full_attention" for i in layers]
    pattern = t.pattern_from_types(hf.get("layer_types") or types)
    if "local" in pattern:
      fields |= {"sliding_window": hf["sliding_window"], "layer_pattern": pattern if len(pattern) > 1 else ()}
  return fields


def _write_qwen(c):
  types = t.types_from_pattern(c)
  window = c.sliding_window is not None
  first = types.index("sliding_attention") if "sliding_attention" in types else c.num_layers
  return write(c) | {
    "use_sliding_window": window,
    "sliding_window": c.sliding_window,
    "max_window_layers": first,
    "layer_types": types,
  }


LLAMA = t.Family("llama", "LlamaForCausalLM", KEYS, WEIGHTS + PRE_NORMS, defaults=DEFAULTS, read=read, write=write)
MISTRAL = t.Family(
  "mistral",
  "MistralForCausalLM",
  KEYS,
  WEIGHTS + PRE_NORMS,
  defaults=DEFAULTS,
  read=read_mistral,
  write=write_mistral,
)
QWEN2 = t.Family(
  "qwen2",
  "Qwen2ForCausalLM",
  KEYS,
  WEIGHTS + PRE_NORMS,
  defaults=DEFAULTS,
  read=lambda hf: _read_qwen(hf) | {"attention_bias": True, "attention_out_bias": False},
  write=_write_qwen,
)
QWEN3 = t.Family(
  "qwen3",
  "Qwen3ForCausalLM",
  KEYS,
  WEIGHTS + PRE_NORMS,
  defaults=DEFAULTS | {"head_dim": 128},
  read=lambda hf: _read_qwen(hf) | {"qk_norm": "head"},
  write=_write_qwen,
)

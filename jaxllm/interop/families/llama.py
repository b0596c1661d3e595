"""Llama, and the families that are Llama with a few settings of their own: Mistral, Qwen 2, Qwen 3."""

from dataclasses import replace

from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope

KEYS = t.KEYS | {
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_eps": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
# of keys that some of the classes made after LlamaConfig lack
DEFAULTS = {"head_dim": None, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}

LAYER = "model.layers.{layer}"
WEIGHTS = (
  t.embedding("embedding/tokens", "model.embed_tokens"),
  *t.linears("blocks/attention", f"{LAYER}.self_attn", query="q_proj", key="k_proj", value="v_proj", output="o_proj"),
  *t.norm("blocks/attention/query_norm", f"{LAYER}.self_attn.q_norm"),
  *t.norm("blocks/attention/key_norm", f"{LAYER}.self_attn.k_norm"),
  *t.linears("blocks/mlp", f"{LAYER}.mlp", gate="gate_proj", up="up_proj", down="down_proj"),
  *t.norm("final_norm", "model.norm"),
  *t.linear("head", "lm_head"),
)
PRE_NORMS = (
  *t.norm("blocks/attention_norm", f"{LAYER}.input_layernorm"),
  *t.norm("blocks/mlp_norm", f"{LAYER}.post_attention_layernorm"),
)


def read(hf):
  return read_rope(hf) | {"mlp_bias": hf["mlp_bias"], "mlp": t.mlp_name(hf["hidden_act"], gated=True)}


def write(c):
  return write_rope(c) | {"hidden_act": t.activation_name(c.mlp)} | ({"mlp_bias": True} if c.mlp_bias else {})


def read_mistral(hf):
  return read(hf) | {"sliding_window": hf.get("sliding_window")}


def write_mistral(c):
  return write_rope(c) | {"hidden_act": t.activation_name(c.mlp), "sliding_window": c.sliding_window}


def _read_qwen(hf):
  """Qwen's window: of the layers from `max_window_layers` on, or of those that `layer_types` names."""
  if not (hf.get("use_sliding_window") and hf.get("sliding_window")):
    return read(hf)
  first, layers = hf.get("max_window_layers", 28), range(hf["num_hidden_layers"])
  types = ["sliding_attention" if i >= first else "full_attention" for i in layers]
  return read(hf) | t.read_windows(hf.get("layer_types") or types, hf["sliding_window"])


def _write_qwen(c):
  types = t.types_from_pattern(c)
  return write(c) | {
    "use_sliding_window": c.sliding_window is not None,
    "sliding_window": c.sliding_window,
    "max_window_layers": types.index("sliding_attention") if "sliding_attention" in types else c.num_layers,
    "layer_types": types,
  }


LLAMA = t.Family(
  "llama",
  "LlamaForCausalLM",
  KEYS | t.BIASES,
  WEIGHTS + PRE_NORMS,
  defaults=DEFAULTS,
  read=read,
  write=write,
)
MISTRAL = replace(
  LLAMA, name="mistral", architecture="MistralForCausalLM", keys=KEYS, read=read_mistral, write=write_mistral
)
QWEN2 = replace(
  LLAMA,
  name="qwen2",
  architecture="Qwen2ForCausalLM",
  read=lambda hf: _read_qwen(hf) | {"attention_bias": True, "attention_out_bias": False},
  write=_write_qwen,
)
QWEN3 = replace(
  LLAMA,
  name="qwen3",
  architecture="Qwen3ForCausalLM",
  fields={"qk_norm": "head"},
  read=_read_qwen,
  write=_write_qwen,
)

"""Gemma 2 (arXiv 2408.00118)."""

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope


def _read(hf):
  bias = hf["attention_bias"]
  types = hf.get("layer_types") or [
    "full_attention" if i % 2 else "sliding_attention" for i in range(hf["num_hidden_layers"])
  ]
  pattern = t.pattern_from_types(types)
  window = hf["sliding_window"] if "local" in pattern else None
  return read_rope(hf) | {
    "attention_bias": bias,
    "attention_out_bias": bias,
    "mlp": t.mlp_name(hf["hidden_activation"], gated=True),
    "query_scale": hf["query_pre_attn_scalar"] ** -0.5,
    "embedding_scale": hf["hidden_size"] ** 0.5,
    "sliding_window": window,
    "layer_pattern": pattern if len(pattern) > 1 else (),
  }


def _write(c):
  return write_rope(c) | {
    "attention_bias": c.attention_bias,
    "hidden_activation": t.activation_name(c.mlp),
    "query_pre_attn_scalar": c.head_dim if c.query_scale is None else round(c.query_scale**-2),
    "sliding_window": c.sliding_window or c.max_seq_len,
    "layer_types": t.types_from_pattern(c),
  }


GEMMA2 = t.Family(
  "gemma2",
  "Gemma2ForCausalLM",
  llama.KEYS | {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
  (
    *llama.WEIGHTS,
    *t.norm("blocks/attention_norm", f"{llama.LAYER}.input_layernorm"),
    *t.norm("blocks/attention_post_norm", f"{llama.LAYER}.post_attention_layernorm"),
    *t.norm("blocks/mlp_norm", f"{llama.LAYER}.pre_feedforward_layernorm"),
    *t.norm("blocks/mlp_post_norm", f"{llama.LAYER}.post_feedforward_layernorm"),
  ),
  fields={"norm_placement": "sandwich", "norm_unit_offset": True},
  defaults=llama.DEFAULTS
  | {
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  requires={"use_bidirectional_attention": None},
  read=_read,
  write=_write,
)

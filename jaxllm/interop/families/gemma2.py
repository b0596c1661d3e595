"""Gemma 2 (arXiv 2408.00118): norms before and after each part, windows in every other layer, soft-caps."""

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import read_rope, write_rope


def read(hf, every):
  """`every`: so many layers one is global."""
  types = t.layer_types(hf, lambda i: (i + 1) % every)
  return (
    read_rope(hf)
    | t.read_windows(types, hf["sliding_window"])
    | {"query_scale": hf["query_pre_attn_scalar"] ** -0.5, "embedding_scale": hf["hidden_size"] ** 0.5}
  )


def write(c):
  return write_rope(c) | {
    "query_pre_attn_scalar": c.head_dim if c.query_scale is None else round(c.query_scale**-2),
    "sliding_window": c.sliding_window or c.max_seq_len,
    "layer_types": t.types_from_pattern(c),
  }


GEMMA2 = t.Family(
  "gemma2",
  "Gemma2ForCausalLM",
  llama.KEYS | t.BIASES | {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
  (
    *llama.FRAME,
    *llama.MLP,
    *t.norm("blocks/attention_norm", f"{llama.LAYER}.input_layernorm"),
    *t.norm("blocks/attention_post_norm", f"{llama.LAYER}.post_attention_layernorm"),
    *t.norm("blocks/mlp_norm", f"{llama.LAYER}.pre_feedforward_layernorm"),
    *t.norm("blocks/mlp_post_norm", f"{llama.LAYER}.post_feedforward_layernorm"),
  ),
  activation="hidden_activation",
  fields={"norm_placement": "sandwich", "norm_unit_offset": True},
  defaults=llama.DEFAULTS,
  requires={"use_bidirectional_attention": None},
  read=lambda hf: read(hf, 2),
  write=write,
)

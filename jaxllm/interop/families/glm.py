"""GLM-4 (arXiv 2406.12793): fused gate and up projections, half of each head rotated in neighbouring pairs; `glm4` (the
models of 2025) has norms on the outputs too."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import interleaved, read_rope, write_rope

WEIGHTS = (
  *interleaved(tuple(w for w in llama.WEIGHTS if not w.ours[0].startswith("blocks/mlp"))),
  *t.linear(("blocks/mlp/gate", "blocks/mlp/up"), f"{llama.LAYER}.mlp.gate_up_proj", t.ROWS),
  *t.linear("blocks/mlp/down", f"{llama.LAYER}.mlp.down_proj"),
  *t.norm("blocks/attention_norm", f"{llama.LAYER}.input_layernorm"),
  *t.norm("blocks/mlp_norm", f"{llama.LAYER}.post_attention_layernorm"),
)


def _read(hf):
  return read_rope(hf, 0.5) | {"mlp": t.mlp_name(hf["hidden_act"], gated=True)}


def _write(c):
  # Its default padding token is of the published vocabulary, and may be outside ours.
  hf = {"partial_rotary_factor": c.rope_fraction, "hidden_act": t.activation_name(c.mlp), "pad_token_id": None}
  return write_rope(c) | hf


GLM = t.Family(
  "glm",
  "GlmForCausalLM",
  llama.KEYS | {"attention_bias": "attention_bias"},
  WEIGHTS,
  read=_read,
  write=_write,
)
GLM4 = dataclasses.replace(
  GLM,
  name="glm4",
  architecture="Glm4ForCausalLM",
  weights=(
    *WEIGHTS,
    *t.norm("blocks/attention_post_norm", f"{llama.LAYER}.post_self_attn_layernorm"),
    *t.norm("blocks/mlp_post_norm", f"{llama.LAYER}.post_mlp_layernorm"),
  ),
  fields={"norm_placement": "sandwich"},
)

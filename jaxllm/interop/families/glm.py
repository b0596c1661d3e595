"""GLM-4 (arXiv 2406.12793): fused gate and up projections, half of each head rotated in neighbouring pairs; `glm4` (the
models of 2025) has norms on the outputs too."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t
from jaxllm.interop.families.rope import interleaved, read_rope, write_rope

WEIGHTS = interleaved(llama.FRAME) + llama.FUSED_MLP + llama.PRE_NORMS


def _write(c):
  # Its default padding token is of the published vocabulary, and may be outside ours.
  return write_rope(c) | {"partial_rotary_factor": c.rope_fraction, "pad_token_id": None}


GLM = t.Family(
  "glm",
  "GlmForCausalLM",
  llama.KEYS | {"attention_bias": "attention_bias"},
  WEIGHTS,
  read=lambda hf: read_rope(hf, 0.5),
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

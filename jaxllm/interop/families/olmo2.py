"""OLMo 2 (arXiv 2501.00656): norms on the outputs, and over all query and key heads at once."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t

OLMO2 = dataclasses.replace(
  llama.LLAMA,
  name="olmo2",
  architecture="Olmo2ForCausalLM",
  weights=(
    *llama.FRAME,
    *llama.MLP,
    *t.norm("blocks/attention_post_norm", f"{llama.LAYER}.post_attention_layernorm"),
    *t.norm("blocks/mlp_post_norm", f"{llama.LAYER}.post_feedforward_layernorm"),
  ),
  fields={"norm_placement": "output", "qk_norm": "full"},
)

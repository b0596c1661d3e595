"""OLMo 1 (arXiv 2402.00838): Llama whose norms have no weights; some sizes bound queries, keys and values."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t

OLMO = dataclasses.replace(
  llama.LLAMA,
  name="olmo",
  architecture="OlmoForCausalLM",
  keys=llama.without("norm_eps", "head_dim") | t.BIASES | {"qkv_clip": "clip_qkv"},
  fields={"norm": "layernorm", "norm_affine": False, "norm_eps": 1e-5},
)

"""OLMo 1 (arXiv 2402.00838): Llama whose norms have no weights; some sizes bound queries, keys and values."""

import dataclasses

from jaxllm.interop.families import llama

OLMO = dataclasses.replace(
  llama.LLAMA,
  name="olmo",
  architecture="OlmoForCausalLM",
  keys={ours: theirs for ours, theirs in llama.LLAMA.keys.items() if ours not in ("norm_eps", "head_dim")}
  | {"qkv_clip": "clip_qkv"},
  fields={"norm": "layernorm", "norm_affine": False, "norm_eps": 1e-5},
)

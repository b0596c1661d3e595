"""DeepSeek-V3 (arXiv 2412.19437): V2 whose experts are scored by sigmoids, balanced by a bias, and chosen in groups."""

import dataclasses

from jaxllm.interop.families import deepseek_v2, llama

DEEPSEEK_V3 = dataclasses.replace(
  deepseek_v2.DEEPSEEK_V2,
  name="deepseek_v3",
  architecture="DeepseekV3ForCausalLM",
  defaults=llama.DEFAULTS | {"norm_topk_prob": True},
  requires={"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rope_interleave": True},
  ignored=("model.layers.{num_layers}.*",),  # the layer that predicts one more token
  read=lambda hf: deepseek_v2.read(hf, grouped=True, scoring="sigmoid", correction_bias=True),
  write=lambda c: deepseek_v2.write(c) | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
)

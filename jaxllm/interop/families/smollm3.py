"""SmolLM3 (Hugging Face, 2025): Llama whose every fourth layer has no positions (NoPE, arXiv 2305.19466)."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t


def _read(hf):
  every, layers = hf["no_rope_layer_interval"], range(hf["num_hidden_layers"])
  rotated = hf.get("no_rope_layers") or [(i + 1) % every != 0 for i in layers]  # 1: rotated, despite the name
  pattern = t.shortest_period(tuple("global" if rotates else "nope" for rotates in rotated))
  return llama.read(hf) | {"layer_pattern": pattern}


def _write(c):
  kinds = [c.layer_kinds[i % len(c.layer_kinds)] for i in range(c.num_layers)]
  # The default padding token is of the published vocabulary, and may be outside ours.
  return llama.write(c) | {"no_rope_layers": [int(kind != "nope") for kind in kinds], "pad_token_id": None}


SMOLLM3 = dataclasses.replace(
  llama.LLAMA,
  name="smollm3",
  architecture="SmolLM3ForCausalLM",
  defaults=llama.DEFAULTS | {"no_rope_layer_interval": 4},
  requires={"use_sliding_window": False},
  read=_read,
  write=_write,
)

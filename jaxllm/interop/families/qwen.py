"""Qwen 2 (arXiv 2407.10671) and Qwen 3 (2505.09388)."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t


def _read(hf):
  """The window is of the layers from `max_window_layers` on, or of those that `layer_types` names."""
  if not (hf.get("use_sliding_window") and hf.get("sliding_window")):
    return llama.read(hf)
  first = hf.get("max_window_layers", 28)
  return llama.read(hf) | t.read_windows(t.layer_types(hf, lambda i: i >= first), hf["sliding_window"])


def _write(c):
  types = t.types_from_pattern(c)
  return llama.write(c) | {
    "use_sliding_window": c.sliding_window is not None,
    "sliding_window": c.sliding_window,
    "max_window_layers": types.index("sliding_attention") if "sliding_attention" in types else c.num_layers,
    "layer_types": types,
  }


QWEN2 = dataclasses.replace(
  llama.LLAMA,
  name="qwen2",
  architecture="Qwen2ForCausalLM",
  fields={"attention_bias": True, "attention_out_bias": False},
  read=_read,
  write=_write,
)
QWEN3 = dataclasses.replace(
  llama.LLAMA,
  name="qwen3",
  architecture="Qwen3ForCausalLM",
  fields={"qk_norm": "head"},
  read=_read,
  write=_write,
)

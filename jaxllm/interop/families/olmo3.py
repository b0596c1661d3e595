"""OLMo 3 (Allen AI, 2025): OLMo 2 with windows in three of four layers, whose RoPE is never stretched."""

import dataclasses

from jaxllm.interop.families import llama, olmo2
from jaxllm.interop.families import table as t
from jaxllm.interop.families.class_defaults import CLASS_DEFAULTS
from jaxllm.interop.families.rope import rope_by_kind, write_rope


def _read(hf):
  stretched = rope_by_kind(hf, "full_attention", scaled=True)
  fields = llama.read(hf | {"rope_parameters": stretched, "rope_scaling": None})
  # A theta beside the groups is of the other layers only, in transformers.
  usual = CLASS_DEFAULTS["olmo3"]["rope_theta"]
  local = rope_by_kind(hf, "sliding_attention", scaled=False).get("rope_theta", usual)
  types = t.layer_types(hf, lambda i: (i + 1) % 4)
  return fields | {"rope_local_theta": float(local)} | t.read_windows(types, hf["sliding_window"])


def _write(c):
  rope = write_rope(c)
  theta = c.rope_theta if c.rope_local_theta is None else c.rope_local_theta
  return llama.write(c) | {
    "rope_parameters": {
      "full_attention": {"rope_theta": c.rope_theta, "rope_type": "default"} | rope.get("rope_scaling", {}),
      "sliding_attention": {"rope_theta": theta, "rope_type": "default"},
    },
    "sliding_window": c.sliding_window or c.max_seq_len,
    "layer_types": t.types_from_pattern(c),
    "pad_token_id": None,  # the default is of the published vocabulary, and may be outside ours
  }


OLMO3 = dataclasses.replace(
  olmo2.OLMO2,
  name="olmo3",
  architecture="Olmo3ForCausalLM",
  keys=llama.without("head_dim") | t.BIASES,
  read=_read,
  write=_write,
)

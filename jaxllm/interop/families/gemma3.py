"""Gemma 3 (arXiv 2503.19786): norms of queries and keys in place of soft-caps, another RoPE in windowed layers."""

import dataclasses

from jaxllm.interop.families import gemma2, llama
from jaxllm.interop.families.rope import rope_by_kind


def _read(hf):
  """Local layers have a theta of their own, beside the global ones' or (from 2026) in an object of their own."""
  local = rope_by_kind(hf, "sliding_attention", scaled=False).get("rope_theta", hf["rope_local_base_freq"])
  stretched = {"rope_parameters": rope_by_kind(hf, "full_attention", scaled=True), "rope_scaling": None}
  return gemma2.read(hf | stretched, hf["sliding_window_pattern"]) | {"rope_local_theta": float(local)}


GEMMA3_TEXT = dataclasses.replace(
  gemma2.GEMMA2,
  name="gemma3_text",
  architecture="Gemma3ForCausalLM",
  # its code passes over the other soft-cap
  keys={ours: theirs for ours, theirs in gemma2.GEMMA2.keys.items() if ours != "attention_softcap"},
  architectures={"none": "Gemma3TextModel"},
  fields=dict(gemma2.GEMMA2.fields) | {"qk_norm": "head"},
  defaults=llama.DEFAULTS | {"sliding_window_pattern": 6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
  requires={"use_bidirectional_attention": False},
  read=_read,
  write=lambda c: gemma2.write(c) | {"rope_local_base_freq": c.rope_local_theta or c.rope_theta},
)
# With the vision tower, which is left aside.
GEMMA3 = dataclasses.replace(
  GEMMA3_TEXT,
  name="gemma3",
  text_config="text_config",
  renamed={"language_model.model.": "model.", "model.language_model.": "model.", "language_model.": ""},
  ignored=("*vision_tower.*", "*multi_modal_projector.*"),
)

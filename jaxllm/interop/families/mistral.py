"""Mistral (arXiv 2310.06825): Llama whose layers may all have a window, and without biases."""

import dataclasses

from jaxllm.interop.families import llama
from jaxllm.interop.families.rope import read_rope, write_rope

MISTRAL = dataclasses.replace(
  llama.LLAMA,
  name="mistral",
  architecture="MistralForCausalLM",
  keys=llama.KEYS | {"sliding_window": "sliding_window"},
  read=read_rope,
  write=write_rope,
)

"""A language model's whole life in JAX, small enough to read.

import jaxllm
model = jaxllm.load_model("runs/quickstart")
model.generate("def ", temperature=0.8, max_tokens=64)[0].text
"""

import importlib

from jaxllm.base import stopping

if stopping.runs_a_door():  # before anything that takes long is imported
  stopping.install()

# name -> the module it comes from, imported at first use: `import jaxllm` alone loads not even jax.
_EXPORTS = {
  "LLM": "jaxllm.inference.llm",
  "Model": "jaxllm.inference.model",
  "load_model": "jaxllm.inference.load",
  "SamplingParams": "jaxllm.inference.params",
  "StructuredOutputsParams": "jaxllm.inference.params",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
  if name not in _EXPORTS:
    raise AttributeError(f"module 'jaxllm' has no attribute {name!r}")
  return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
  return sorted([*globals(), *_EXPORTS])

"""The architectures of GGUF that are known here, and which family's a file is.

Sources of their tables: llama.cpp's conversion/*.py (what is written) and src/models/*.cpp (what is read).
"""

from jaxllm.interop.gguf.decoders import DECODERS
from jaxllm.interop.gguf.encoders import ENCODERS, LABELS, TYPE_TABLE, WRITTEN_AS
from jaxllm.interop.gguf.mixtures import MIXTURES, SIGMOID
from jaxllm.interop.gguf.table import Architecture, Metadata

_ALL = DECODERS + MIXTURES + ENCODERS
BY_MODEL_TYPE = {a.model_type: a for a in _ALL}
_FIRST = {a.name: a for a in reversed(_ALL)}  # a Mistral file reads as Llama
KNOWN = tuple(_FIRST)
WRITABLE = tuple(dict.fromkeys((*BY_MODEL_TYPE, *WRITTEN_AS)))  # families


def architecture_of(name: str, m: Metadata) -> Architecture:
  """The family by which a file of one of the architectures KNOWN is read."""
  if name == "llama" and m.number("expert_count"):
    return BY_MODEL_TYPE["mixtral"]
  if name == "olmo2" and m.number("attention.sliding_window"):
    return BY_MODEL_TYPE["olmo3"]
  if name == "deepseek2" and m.number("expert_gating_func") == SIGMOID:
    return BY_MODEL_TYPE["deepseek_v3"]
  if name == "bert" and LABELS in m.tensors:
    return BY_MODEL_TYPE["bert"]
  if name == "bert" and TYPE_TABLE not in m.tensors:
    return BY_MODEL_TYPE["distilbert"]
  return _FIRST[name]

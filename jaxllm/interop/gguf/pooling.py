"""How the states of a text become one vector: GGUF's `pooling_type`, which stands for sentence-transformers' files.

llama.cpp then scales the vector to length 1, unless it is told otherwise (`--embd-normalize -1`).
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf.header import entry
from jaxllm.interop.sentence_transformers import MODULES, POOLINGS, TextVectors

log = logging.getLogger("jaxllm")
_TYPES = {"mean": 1, "first": 2, "last": 3}
_NONE, RANK = 0, 4  # the last: a classifier's head
_FOLDER = "1_Pooling"


def pooling_type(vectors: TextVectors) -> int:
  """The number that stands for it; what is not in the file is logged.

  Raises:
    ConfigError: llama.cpp makes no such vector.
  """
  if len(vectors.pooling) > 1 or vectors.pooling[0] not in _TYPES:
    known = ", ".join(_TYPES)
    raise ConfigError(f"GGUF has no pooling {' and '.join(vectors.pooling)} for the model's vectors, only {known}")
  if any(vectors.steps):
    raise ConfigError(
      f"GGUF has no place for the Dense layer behind the pooling; write the model without its {MODULES}"
    )
  if not vectors.steps:
    log.warning("GGUF: llama.cpp scales vectors to length 1, unless it is told otherwise, and the model does not")
  if prompts := [name for name, text in vectors.prompts.items() if text]:
    log.warning("GGUF: the prompts of texts (%s) are not in the file; put them before the texts", ", ".join(prompts))
  if vectors.lower:
    log.warning("GGUF: the file does not say that texts are in small letters first")
  return _TYPES[vectors.pooling[0]]


def text_vectors(entries: Mapping[str, Any], architecture: str, width: int) -> TextVectors | None:
  """What a file says of a text's vector, with sentence-transformers' files of the same; None: nothing.

  Raises:
    CheckpointError: a kind of pooling that is not known here.
  """
  key = f"{architecture}.pooling_type"
  number = entry(entries, key, int, _NONE)
  if number in (_NONE, RANK):
    return None
  pooling = {value: name for name, value in _TYPES.items()}.get(number)
  if pooling is None:
    raise CheckpointError(
      f"the GGUF metadata {key} is {number}; those known are {', '.join(map(str, _TYPES.values()))}"
    )
  kinds = {"": "Transformer", _FOLDER: "Pooling", "2_Normalize": "Normalize"}
  modules = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(kinds.items())
  ]
  mode = {ours: theirs for theirs, ours in POOLINGS.items()}[pooling]
  flags = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
  settings = {"word_embedding_dimension": width} | {f"pooling_mode_{flag}": m == mode for m, flag in flags.items()}
  files = {MODULES: modules, f"{_FOLDER}/config.json": settings}
  encoded = {name: json.dumps(value, indent=2).encode() for name, value in files.items()}
  return TextVectors((pooling,), (None,), files=encoded)

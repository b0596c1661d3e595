"""Examples with several fields, as `prepare` tokenizes them: pairs, and texts with labels.

A source's document is then the JSON list of its fields; each task knows them by place, `data.sources.*.fields`
by name. A text of no such task is a single part.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.sources import Document
from jaxllm.data.text import to_bytes
from jaxllm.data.tokenizers import Tokenizer

# The usual names. "classification" takes two or three fields: (text, label) or (text, second text, label).
# "token_classification": a list of words and a list of their labels.
FIELDS = {
  "pairs": ("source", "target"),
  "classification": ("text", "label"),
  "token_classification": ("words", "labels"),
}
IGNORED = -100  # the label of a token that is not to be predicted, as in transformers
Ids = Int[np.ndarray, " tokens"]


def example_sources(config: DataConfig) -> list[SourceConfig]:
  """The sources with the fields that the task reads; raises DataError where they cannot be what it needs."""
  usual = FIELDS.get(config.task)
  sources = []
  for source in config.sources:
    fields = source.fields or usual or ()
    allowed = (0,) if usual is None else (2, 3) if config.task == "classification" else (2,)
    if len(fields) not in allowed:
      raise DataError(
        f"data.task {config.task!r} reads {' or '.join(map(str, allowed))} fields of an example"
        f"{f', such as {usual}' if usual else ''}; a source's `fields` are {fields}"
      )
    if usual and source.kind == "text":
      raise DataError(f"data.task {config.task!r} needs examples with fields; {source.path} is a source of plain text")
    sources.append(dataclasses.replace(source, fields=fields))
  return sources


def texts_of(document: Document, task: str) -> Iterator[bytes]:
  """What a tokenizer is trained on."""
  if task not in FIELDS:
    yield document.data
    return
  values = json.loads(document.data)
  for value in values if task == "pairs" else values[:-1]:
    yield to_bytes(" ".join(value) if isinstance(value, list) else value)


def encode(config: DataConfig, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[list[Ids]]:
  """The parts of each document: (text,), (source, target), or (text, second text, labels).

  Of words only the first token has the word's label. Raises DataError for an example of another form.
  """
  if config.task not in FIELDS:
    return [[ids] for ids in tokenizer.encode_batch([document.data for document in documents])]
  examples = [json.loads(document.data) for document in documents]
  if config.task == "token_classification":
    return _encode_words(config, tokenizer, documents, examples)
  texts = [row if config.task == "pairs" else row[:-1] for row in examples]
  for document, row in zip(documents, texts):
    if not all(isinstance(text, str) and text for text in row):
      raise DataError(f"{document.id}: data.task {config.task!r} needs text that is not empty, this is {row}")
  encoded = iter(tokenizer.encode_batch(list(itertools.chain(*texts))))
  parts = [[next(encoded) for _ in row] for row in texts]
  if config.task == "pairs":
    return parts
  nothing = np.zeros(0, np.int32)
  return [
    [*(row if len(row) == 2 else [row[0], nothing]), np.array([_label(config, document, example[-1])], np.int32)]
    for row, document, example in zip(parts, documents, examples)
  ]


def _encode_words(config, tokenizer, documents, examples) -> list[list[Ids]]:
  for document, (words, labels) in zip(documents, examples):
    if not (isinstance(words, list) and isinstance(labels, list) and len(words) == len(labels) > 0):
      raise DataError(f"{document.id}: words and labels must be two lists of one length")
  flat = [(" " if i else "") + word for words, _ in examples for i, word in enumerate(words)]
  encoded = iter(tokenizer.encode_batch(flat))
  rows = []
  for document, (words, labels) in zip(documents, examples):
    tokens = [next(encoded) for _ in words]
    marked = [np.full(len(ids), IGNORED, np.int32) for ids in tokens]
    for ids, label in zip(marked, labels):
      ids[:1] = _label(config, document, label)
    rows.append([np.concatenate(tokens), np.zeros(0, np.int32), np.concatenate(marked)])
  return rows


def _label(config: DataConfig, document: Document, label: Any) -> int:
  """The number of a class from its name or number."""
  if config.labels and label in config.labels:
    return config.labels.index(label)
  if isinstance(label, int) and (label == IGNORED or 0 <= label < (len(config.labels) or 2**31)):
    return label
  known = f"one of data.labels ({', '.join(config.labels[:8])}{', …' if len(config.labels) > 8 else ''})"
  raise DataError(f"{document.id}: label {label!r} is not {known if config.labels else 'a number; set data.labels'}")

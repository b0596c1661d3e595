"""Examples with several fields, as `prepare` tokenizes them: pairs, texts with labels, conversations, preferences.

A source's document is then the JSON list of its fields; each task knows them by place, `data.sources.*.fields`
by name. Of instruction data it is a conversation or preference as JSON. A text of no such task is a single part.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig, SourceConfig
from jaxllm.data.conversations import TEXT, Conversation, conversation_of, from_json, preference_of, to_json
from jaxllm.data.masks import Example, Masker
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
CHAT = ("chat", "preference")
# How many parts an example has, and how many of them, the first ones, are tokens.
PARTS = {"pairs": (2, 2), **dict.fromkeys(("classification", "token_classification"), (3, 3))}
PARTS |= {"chat": (4, 3), "preference": (6, 4)}
IGNORED = -100  # the label of a token that is not to be predicted, as in transformers
Ids = Int[np.ndarray, " tokens"]


def example_sources(config: DataConfig) -> list[SourceConfig]:
  """The sources with the fields that the task reads; raises DataError where they cannot be what it needs."""
  if config.task in CHAT:  # which reads whole rows
    renamed = [{"text": s.field} if s.field != "text" else {} for s in config.sources]
    return [dataclasses.replace(s, field="", columns=r | s.columns) for s, r in zip(config.sources, renamed)]
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


def content_of(task: str) -> Callable[[Any, SourceConfig], bytes] | None:
  """What makes a document of a row of instruction data; None: its fields are the document."""
  convert = {"chat": conversation_of, "preference": preference_of}.get(task)
  return None if convert is None else lambda row, source: to_json(convert(row, source.format, source.columns))


def texts_of(document: Document, task: str) -> Iterator[bytes]:
  """What a tokenizer is trained on."""
  if task in CHAT:
    sides = _conversations(document)
    yield from (to_bytes(message.content) for side in sides for message in side.messages if message.content)
    return
  if task not in FIELDS:
    yield document.data
    return
  values = json.loads(document.data)
  for value in values if task == "pairs" else values[:-1]:
    yield to_bytes(" ".join(value) if isinstance(value, list) else value)


def make_encoder(config: DataConfig, tokenizer: Tokenizer) -> Callable[[Sequence[Document]], list[list[Ids]]]:
  """What gives the parts of each document.

  A text is one part; a pair is (source, target), what has labels (text, second text, labels). Of words only the first
  token has the word's label. Of a conversation it is the tokens before the first that is trained, those up to the last
  that is, those behind, and `packed` weights; of a preference the tokens before the first that is trained, those that
  both sides have still, the rest of chosen, of rejected, and the packed weights of each.

  It raises DataError for an example of another form.
  """
  if config.task not in CHAT:
    return functools.partial(_encode, config, tokenizer)
  masker = Masker(tokenizer, config.chat)
  return functools.partial(_encode_chats if config.task == "chat" else _encode_preferences, masker)


def _encode_chats(masker: Masker, documents: Sequence[Document]) -> list[list[Ids]]:
  parts = []
  for ids, weights in _examples(masker, documents):
    trained = np.flatnonzero(weights)
    parts.append([*np.split(ids, [trained[0], trained[-1] + 1]), packed(weights)])
  return parts


def _encode_preferences(masker: Masker, documents: Sequence[Document]) -> list[list[Ids]]:
  examples = iter(_examples(masker, documents))
  parts = []
  for document, chosen, rejected in zip(documents, examples, examples):
    first = min(np.flatnonzero(side.weights)[0] for side in (chosen, rejected))
    shorter = min(len(chosen.ids), len(rejected.ids))
    differ = np.flatnonzero(chosen.ids[:shorter] != rejected.ids[:shorter])
    shared = int(differ[0]) if len(differ) else shorter
    if shared < first:
      raise DataError(f"{document.where}: the chat template writes two prompts for chosen and rejected")
    if shared == len(chosen.ids) == len(rejected.ids):
      raise DataError(f"{document.where}: chosen and rejected have the same tokens")
    parts.append(
      [
        *np.split(chosen.ids[:shared], [first]),
        chosen.ids[shared:],
        rejected.ids[shared:],
        packed(chosen.weights),
        packed(rejected.weights),
      ]
    )
  return parts


def question_of(document: Document) -> bytes:
  """What a conversation or preference asks: all before the first answer, or the whole text where that is nothing."""
  one = _conversations(document)[0]
  before = itertools.takewhile(lambda message: message.role not in ("assistant", TEXT), one.messages)
  said = [(message.role, message.content) for message in one.messages[: one.prompt] or before]
  return json.dumps(said).encode() if said else document.data


def _conversations(document: Document) -> Sequence[Conversation]:
  value = from_json(document.data)
  return (value,) if isinstance(value, Conversation) else value.sides


def _examples(masker: Masker, documents: Sequence[Document]) -> list[Example]:
  """All conversations of the documents as examples; an error names its document."""
  groups = [_conversations(document) for document in documents]
  try:
    return masker([conversation for group in groups for conversation in group])
  except DataError:
    for document, group in zip(documents, groups):
      try:
        masker(group)
      except DataError as error:
        raise DataError(f"{document.where}: {error}") from error
    raise


def packed(weights: Float32[np.ndarray, " tokens"]) -> Ids:
  """Runs of equal weights: how long each is, and the weight's bits."""
  starts = np.concatenate([[0], np.flatnonzero(np.diff(weights)) + 1])
  lengths = np.diff(np.append(starts, len(weights)))
  return np.stack([lengths, weights[starts].view(np.int32)], axis=1).reshape(-1).astype(np.int32)


def unpacked(runs: Ids) -> Float32[np.ndarray, " tokens"]:
  """The inverse of `packed`."""
  lengths, bits = runs.reshape(-1, 2).T
  return np.repeat(np.ascontiguousarray(bits, np.int32).view(np.float32), lengths)


def _encode(config: DataConfig, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[list[Ids]]:
  if config.task not in FIELDS:
    return [[ids] for ids in tokenizer.encode_batch([document.data for document in documents])]
  examples = [json.loads(document.data) for document in documents]
  if config.task == "token_classification":
    return _encode_words(config, tokenizer, documents, examples)
  texts = [row if config.task == "pairs" else row[:-1] for row in examples]
  for document, row in zip(documents, texts):
    if not all(isinstance(text, str) and text for text in row):
      raise DataError(f"{document.where}: data.task {config.task!r} needs text that is not empty, this is {row}")
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
      raise DataError(f"{document.where}: words and labels must be two lists of one length")
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
  raise DataError(f"{document.where}: label {label!r} is not {known if config.labels else 'a number; set data.labels'}")

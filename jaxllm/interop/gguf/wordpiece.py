"""BERT's WordPiece tokenizers in GGUF metadata, in both directions.

llama.cpp ("bert") marks where a word begins with U+2581, and not where it goes on with "##"; it cuts text as BERT does,
and lower-cases it and takes accents away as the metadata say (older versions: always).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError, DataError
from jaxllm.data.tokenizers.sentencepiece import FLAGS
from jaxllm.interop.gguf.header import entry

_PREFIX, _WORD = "##", "\u2581"
# Roles of BERT's tokens -> the metadata's, where 'seperator' is spelled so
KEYS = {"cls_token": "cls", "sep_token": "seperator", "mask_token": "mask"}
_LOWER, STRIP = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
NORMAL, CONTROL = 1, 3


def added_token(i: int, text: str, special: bool) -> dict[str, Any]:
  """An entry of tokenizer.json's `added_tokens`."""
  return {"id": i, "content": text, "special": special} | dict.fromkeys(FLAGS, False)


def template(tokens: list[str], first: int | None, last: int | None, again: bool) -> dict[str, Any] | None:
  """The post-processor of tokenizer.json that puts tokens around a text, by their ids; None where there are none.

  Args:
    again: the first stands before the second text of a pair too.
  """

  def around(name: str, type_id: int, first: int | None) -> list[dict[str, Any]]:
    mark = lambda i: [] if i is None else [{"SpecialToken": {"id": tokens[i], "type_id": type_id}}]  # noqa: E731
    return [*mark(first), {"Sequence": {"id": name, "type_id": type_id}}, *mark(last)]

  used = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (first, last) if i is not None}
  pair = around("A", 0, first) + around("B", 1, first if again else None)
  single = {"type": "TemplateProcessing", "single": around("A", 0, first)}
  return single | {"pair": pair, "special_tokens": used} if used else None


def write_wordpiece(definition: Mapping[str, Any]) -> tuple[dict[int, str], dict[int, int], dict[str, Any]]:
  """Tokens and their types by id, and what the metadata say of the text, of a tokenizer.json.

  Raises:
    DataError: it cuts text in another way than BERT.
  """
  model, normalizer = definition["model"], definition.get("normalizer") or {}
  steps = normalizer.get("type"), (definition.get("pre_tokenizer") or {}).get("type")
  plain = normalizer.get("clean_text", True) and normalizer.get("handle_chinese_chars", True)
  if steps != ("BertNormalizer", "BertPreTokenizer") or not plain or model["continuing_subword_prefix"] != _PREFIX:
    raise DataError(
      "the WordPiece tokenizer cuts or cleans text in another way than BERT's, and llama.cpp has no other"
    )
  added = {token["id"]: token["content"] for token in definition.get("added_tokens") or ()}
  tokens = {
    i: token.removeprefix(_PREFIX) if token.startswith(_PREFIX) else _WORD + token
    for token, i in model["vocab"].items()
  }
  lower = normalizer.get("lowercase", True)
  strip = normalizer.get("strip_accents")
  types = dict.fromkeys(tokens, NORMAL) | dict.fromkeys(added, CONTROL)
  return tokens | added, types, {_LOWER: lower, STRIP: lower if strip is None else strip}


def read_wordpiece(entries: Mapping[str, Any], tokens: list[str], types: np.ndarray, ids: Mapping[str, Any]) -> bytes:
  """The tokenizer.json of metadata.

  Raises:
    CheckpointError: they lack a token that BERT's cannot do without.
  """
  if lacking := [name for name in ("bos", "seperator", "unk") if ids.get(f"{name}_token_id") is None]:
    raise CheckpointError(f"the GGUF file lacks tokenizer.ggml.{lacking[0]}_token_id, which its tokenizer needs")
  special = [i for i in range(len(tokens)) if types[i] == CONTROL]
  vocab = {}
  for i, token in enumerate(tokens):
    whole = i in special or token.startswith(_WORD)
    vocab[token.removeprefix(_WORD) if whole else _PREFIX + token] = i
  lower = entry(entries, _LOWER, bool, True)
  definition = {
    "version": "1.0",
    "added_tokens": [added_token(i, tokens[i], True) for i in special],
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    | {"strip_accents": entry(entries, STRIP, bool, lower), "lowercase": lower},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": template(tokens, ids["bos_token_id"], ids["seperator_token_id"], again=False),
    "decoder": {"type": "WordPiece", "prefix": _PREFIX, "cleanup": True},
    "model": {"type": "WordPiece", "unk_token": tokens[ids["unk_token_id"]], "continuing_subword_prefix": _PREFIX}
    | {"max_input_chars_per_word": 100, "vocab": vocab},
  }
  return json.dumps(definition, ensure_ascii=False).encode()

"""Finds and reads the tokenizer files of a model."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from jaxllm.base.errors import DataError, shown
from jaxllm.base.files import regular
from jaxllm.base.os_errors import file_errors
from jaxllm.base.strangers import declared, parse_json, read_json
from jaxllm.data import chat
from jaxllm.data.tokenizers.base import (
  SETTINGS_FILE,
  TEMPLATE_FILE,
  Tokenizer,
  damaged,
  named_templates,
  special_of,
  token_text,
)
from jaxllm.data.tokenizers.classes import CLASSES, as_class, class_of
from jaxllm.data.tokenizers.from_sentencepiece import from_sentencepiece
from jaxllm.data.tokenizers.huggingface import HUGGINGFACE_FILE, HuggingFaceTokenizer
from jaxllm.data.tokenizers.sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer
from jaxllm.data.tokenizers.settings import AddedTokens, checked, unread

log = logging.getLogger("jaxllm")
_WORDPIECE_FILE, _BPE_FILE, _MERGES_FILE = "vocab.txt", "vocab.json", "merges.txt"
_FILES = (HUGGINGFACE_FILE, SENTENCEPIECE_FILE, "spiece.model", _BPE_FILE, _WORDPIECE_FILE)  # the first counts
MAX_BYTES = 1 << 28  # of a tokenizer's file
_SHIFTED_FILE = "sentencepiece.bpe.model"  # its ids are shifted against its model by its class (XLM-R, CamemBERT, …)
_DEBERTA_FILE = "spm.model"


def find_tokenizer(directory: Path) -> Path | None:
  """The file in a directory from which `load_tokenizer` would read a tokenizer."""
  found = [directory / name for name in _FILES if (directory / name).is_file()]
  return next(iter(found or sorted(directory.glob("*.model"))), None)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.json, a SentencePiece model, GPT-2's vocab.json with merges.txt or BERT's vocab.txt, or
  a directory that holds one; with it the tokenizer_config.json and the chat templates beside it.

  The class that they name decides how they are read, or the kind of model in a config.json beside them; see `classes`.

  Raises:
    DataError: there is none, or it is damaged.
  """
  path = Path(path).expanduser()
  if path.is_dir():
    found = find_tokenizer(path)
    if found is None:
      raise DataError(f"no tokenizer in {path}: it needs a {HUGGINGFACE_FILE} or a SentencePiece .model")
    path = found
  with file_errors(path, "cannot read the tokenizer", DataError):
    try:
      if regular(path).stat().st_size > MAX_BYTES:
        raise DataError(f"it has {path.stat().st_size} bytes, and at most {MAX_BYTES} make sense")
      tokenizer = _read(path, path.read_bytes())
      _say_unknown(tokenizer, path.with_name(SETTINGS_FILE))
      return tokenizer
    except (DataError, UnicodeDecodeError) as error:
      raise DataError(f"cannot load the tokenizer {path}: {error}") from error


def _say_unknown(tokenizer: Tokenizer, where: Path) -> None:
  """A line of the log on special tokens that the vocabulary has not: transformers would put them behind its end."""
  named = {token_text(token) or "" for token in special_of(tokenizer.settings)} - {""}
  if unknown := sorted(t for t in named if t not in map(tokenizer.token_text, tokenizer.encode_prompt(t))):
    log.warning("%s: %s: not in the vocabulary, so read as any text", where, ", ".join(map(shown, unknown)))


def _read(path: Path, data: bytes) -> Tokenizer:
  settings, config = _settings_beside(path), _object(path.with_name("config.json"))
  text = data.decode() if path.name == HUGGINGFACE_FILE else None
  name = class_of(settings, config, text)
  code = settings.get("auto_map")
  if code is not None and (not isinstance(code, dict) or "AutoTokenizer" in code):
    log.warning("%s: its auto_map names code of its own, which is not run here", path.with_name(SETTINGS_FILE))
  if name == "M2M100Tokenizer" and path.name == _BPE_FILE:
    from_sentencepiece(b"", name, settings)
  if path.name == _BPE_FILE:
    name = name or "GPT2Tokenizer"
    return _built(name, _byte_level_bpe(path, name), settings)
  if path.name == _WORDPIECE_FILE:
    name = name if CLASSES.get(name or "", CLASSES["GPT2Tokenizer"]).model["type"] == "WordPiece" else "BertTokenizer"
    return _built(name, _wordpiece(data.decode(), name, settings), settings)
  if path.suffix == ".json":
    return _as_declared(name, data.decode(), settings)
  if name is not None and path.name in (_SHIFTED_FILE, _DEBERTA_FILE):
    with damaged("not a SentencePiece model, or a damaged one"):
      definition, settings = from_sentencepiece(data, name, settings)
    return HuggingFaceTokenizer(definition, settings)
  if path.name == _SHIFTED_FILE:
    raise DataError(f"its ids need a class of their own; save the tokenizer as a {HUGGINGFACE_FILE}")
  return SentencePieceTokenizer(data, settings if name is None else _with_class(name, settings))


def _with_class(name: str, settings: dict[str, Any]) -> dict[str, Any]:
  """The settings with the class, and what else it says, but for tokens."""
  defaults = CLASSES[name].defaults if name in CLASSES else {}
  return {key: v for key, v in defaults.items() if not key.endswith("_token")} | settings | {"tokenizer_class": name}


def _as_declared(name: str | None, text: str, settings: dict[str, Any]) -> HuggingFaceTokenizer:
  """A tokenizer.json and settings as a class reads them; the same text where nothing changes."""
  parsed = definition = parse_json(text, "it", DataError)
  if name is not None and isinstance(parsed, dict) and isinstance(parsed.get("model"), dict):
    with damaged("not a tokenizer.json, or a damaged one"):
      definition, settings = as_class(name, parsed, settings)
  return HuggingFaceTokenizer(text if definition == parsed else definition, settings, parsed)


def _built(name: str, model: dict[str, Any], settings: dict[str, Any]) -> HuggingFaceTokenizer:
  """A tokenizer of a class and a vocabulary."""
  empty: dict[str, Any] = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": model}
  definition, settings = as_class(name, empty, settings, whole=False)
  return HuggingFaceTokenizer(definition, settings)


def _settings_beside(path: Path) -> dict[str, Any]:
  """tokenizer_config.json next to a tokenizer, and what older and newer layouts keep in files of their own."""
  settings, tokens = _object(path.with_name(SETTINGS_FILE)), _object(path.with_name("special_tokens_map.json"))
  # The map says more, in older layouts; in newer ones nothing.
  settings = tokens | settings if "added_tokens_decoder" in settings else settings | tokens
  later = {"ids": _object(path.with_name("added_tokens.json"))}
  if later["ids"] and "added_tokens_decoder" not in settings:
    ids = declared(AddedTokens, later, "added_tokens.json", DataError)["ids"]
    special = {token_text(token) for token in special_of(settings)}
    flags = {token: {"special": token in special, "normalized": token not in special} for token in ids}
    settings["added_tokens_decoder"] = {str(i): {"content": token, **flags[token]} for token, i in ids.items()}
  settings = checked(settings, SETTINGS_FILE)
  if keys := unread(settings):
    log.warning(
      "%s: %s: not known, and without effect here", path.with_name(SETTINGS_FILE), ", ".join(map(shown, keys))
    )
  named = sorted(path.parent.glob("additional_chat_templates/*.jinja"))
  files = {file.stem: file for file in named} | {"default": path.with_name(TEMPLATE_FILE)}
  files = {name: file for name, file in files.items() if file.is_file()}
  for file in files.values():
    if file.stat().st_size > chat.MAX_TEMPLATE:
      raise DataError(f"{file.name} has {file.stat().st_size} bytes, and at most {chat.MAX_TEMPLATE} make sense")
  templates = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
  if templates:
    templates = named_templates(settings) | templates
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
  return settings


def _object(path: Path) -> dict[str, Any]:
  """The object in a JSON file; {} where there is no file."""
  return read_json(path, error=DataError) if path.is_file() else {}


def _byte_level_bpe(path: Path, name: str) -> dict[str, Any]:
  """The model of GPT-2's or RoBERTa's vocab.json and merges.txt."""
  import tokenizers

  kind = CLASSES.get(name)
  if kind is None or kind.model["type"] != "BPE" or kind.model.get("byte_fallback"):
    raise DataError(f"it is a {name}, which {_BPE_FILE} does not tell in full; save it as a {HUGGINGFACE_FILE}")
  if not path.with_name(_MERGES_FILE).is_file():
    raise DataError(f"there is no {_MERGES_FILE} beside it")
  # The library makes a list as long as the largest id.
  declared(AddedTokens, {"ids": read_json(path, MAX_BYTES, DataError)}, _BPE_FILE, DataError)
  with damaged(f"{_BPE_FILE} or {_MERGES_FILE} is damaged"):
    model = tokenizers.models.BPE.from_file(str(path), str(path.with_name(_MERGES_FILE)))
    return json.loads(tokenizers.Tokenizer(model).to_str())["model"] | kind.model


def _wordpiece(vocabulary: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
  """The model of BERT's vocab.txt, a token a line."""
  tokens = vocabulary.split("\n")
  ids = {token.rstrip("\r"): i for i, token in enumerate(tokens) if token or i < len(tokens) - 1}
  unknown = token_text(settings.get("unk_token")) or CLASSES[name].defaults["unk_token"]
  if unknown not in ids:
    raise DataError(f"it has no {unknown}, so it is not BERT's vocabulary")
  words = {"unk_token": unknown, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": ids}
  return CLASSES[name].model | words

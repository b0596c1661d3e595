"""Finds and reads the tokenizer files of a model."""

import os
from pathlib import Path
from typing import Any

from jaxllm.base.errors import DataError
from jaxllm.base.files import regular
from jaxllm.base.os_errors import file_errors
from jaxllm.base.strangers import declared, read_json
from jaxllm.data import chat
from jaxllm.data.tokenizers.base import SETTINGS_FILE, TEMPLATE_FILE, Tokenizer, damaged, named_templates
from jaxllm.data.tokenizers.huggingface import HUGGINGFACE_FILE, HuggingFaceTokenizer
from jaxllm.data.tokenizers.sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer
from jaxllm.data.tokenizers.settings import AddedTokens, checked

_WORDPIECE_FILE, _BPE_FILE, _MERGES_FILE = "vocab.txt", "vocab.json", "merges.txt"
_FILES = (HUGGINGFACE_FILE, SENTENCEPIECE_FILE, "spiece.model", _BPE_FILE, _WORDPIECE_FILE)  # the first counts
# Its ids are shifted against its model by code of its class (XLM-R, CamemBERT, …).
MAX_BYTES = 1 << 28  # of a tokenizer's file
_SHIFTED_FILE = "sentencepiece.bpe.model"


def find_tokenizer(directory: Path) -> Path | None:
  """The file in a directory from which `load_tokenizer` would read a tokenizer."""
  found = [directory / name for name in _FILES if (directory / name).is_file()]
  return next(iter(found or sorted(directory.glob("*.model"))), None)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Reads a tokenizer.json, a SentencePiece model, GPT-2's vocab.json with merges.txt or BERT's vocab.txt, or
  a directory that holds one; with it the tokenizer_config.json and the chat templates beside it.

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
      data = path.read_bytes()
      settings = _settings_beside(path)
      if path.name == _SHIFTED_FILE:
        raise DataError(f"its ids need a class of their own; save the tokenizer as a {HUGGINGFACE_FILE}")
      if path.name == _BPE_FILE:
        return HuggingFaceTokenizer(*_byte_level_bpe(path, settings))
      if path.name == _WORDPIECE_FILE:
        return HuggingFaceTokenizer(_wordpiece(data.decode(), settings), settings)
      if path.suffix == ".json":
        return HuggingFaceTokenizer(data.decode(), settings)
      return SentencePieceTokenizer(data, settings)
    except (DataError, UnicodeDecodeError) as error:
      raise DataError(f"cannot load the tokenizer {path}: {error}") from error


def _settings_beside(path: Path) -> dict[str, Any]:
  """tokenizer_config.json next to a tokenizer, and what older and newer layouts keep in files of their own."""
  settings = _object(path.with_name("special_tokens_map.json")) | _object(path.with_name(SETTINGS_FILE))
  later = {"ids": _object(path.with_name("added_tokens.json"))}
  if later["ids"] and "added_tokens_decoder" not in settings:
    ids = declared(AddedTokens, later, "added_tokens.json", DataError)["ids"]
    settings["added_tokens_decoder"] = {str(i): {"content": token} for token, i in ids.items()}
  settings = checked(settings, SETTINGS_FILE)
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


def _byte_level_bpe(path: Path, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
  """The tokenizer.json of GPT-2's or RoBERTa's vocab.json and merges.txt, and the settings of its class."""
  import tokenizers
  from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

  kind = settings.get("tokenizer_class", "GPT2Tokenizer").removesuffix("Fast")
  if kind not in ("GPT2Tokenizer", "RobertaTokenizer", "BartTokenizer"):
    raise DataError(f"it is a {kind}, which {_BPE_FILE} does not tell in full; save it as a {HUGGINGFACE_FILE}")
  if not path.with_name(_MERGES_FILE).is_file():
    raise DataError(f"there is no {_MERGES_FILE} beside it")
  # The library makes a list as long as the largest id.
  declared(AddedTokens, {"ids": read_json(path, MAX_BYTES, DataError)}, _BPE_FILE, DataError)
  with damaged(f"{_BPE_FILE} or {_MERGES_FILE} is damaged"):
    model = models.BPE.from_file(str(path), str(path.with_name(_MERGES_FILE)))
  tokenizer = tokenizers.Tokenizer(model)
  space = bool(settings.get("add_prefix_space"))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
  tokenizer.decoder = decoders.ByteLevel()
  known = lambda *tokens: all(tokenizer.token_to_id(token) is not None for token in tokens)  # noqa: E731
  if known("<s>", "</s>", "<mask>"):  # RoBERTa and BART
    end, start = ((token, tokenizer.token_to_id(token)) for token in ("</s>", "<s>"))
    tokenizer.post_processor = processors.RobertaProcessing(end, start, trim_offsets=True, add_prefix_space=space)
    tokenizer.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True)])
    return tokenizer.to_str(), {"cls_token": "<s>", "sep_token": "</s>"} | settings
  roles = dict.fromkeys(("bos_token", "unk_token"), "<|endoftext|>") if known("<|endoftext|>") else {}
  return tokenizer.to_str(), roles | settings


def _wordpiece(vocabulary: str, settings: dict[str, Any]) -> str:
  """The tokenizer.json of BERT's vocab.txt, a token a line."""
  from tokenizers import BertWordPieceTokenizer

  tokens = vocabulary.split("\n")
  ids = {token.rstrip("\r"): i for i, token in enumerate(tokens) if token or i < len(tokens) - 1}
  for token in ("[UNK]", "[CLS]", "[SEP]"):
    if token not in ids:
      raise DataError(f"it has no {token}, so it is not BERT's vocabulary")
  lowercase = settings.get("do_lower_case", True)
  return BertWordPieceTokenizer(
    ids,
    lowercase=lowercase,
    handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    strip_accents=settings.get("strip_accents"),
  ).to_str()

"""One tokenizer interface over SentencePiece models and Hugging Face tokenizer.json files.

Documents are bytes, and may hold bytes that are not UTF-8: such runs go through the vocabulary's single-byte
pieces, so that a tokenizer with byte pieces and without normalization (every one trained here) is lossless.
"""

import abc
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from jaxllm.data.text import to_bytes
from jaxllm.errors import DataError

Ids = Int32[np.ndarray, " tokens"]
SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
SPECIAL_FILE = "tokenizer_config.json"
_SPACE = "\u2581"  # SentencePiece writes spaces so inside its pieces
# Bytes that are not UTF-8 decode to these surrogates (PEP 383).
_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")
_NOT_UTF8_OR_SPACE = re.compile(f"([\udc80-\udcff{_SPACE}]+)")


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Ids that the vocabulary does not have are None. `fingerprint` is a SHA-256 that two tokenizers share only
  when they encode alike.
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  pad_id: int | None
  unk_id: int | None
  fingerprint: str
  _byte_ids: dict[int, int]  # single-byte pieces, where the vocabulary has them

  def encode(self, text: str | bytes) -> Ids:
    """Ids of one text; adds no special tokens and reads none in the text (they are plain characters)."""
    return self.encode_batch([text])[0]

  @abc.abstractmethod
  def encode_batch(self, texts: Sequence[str | bytes]) -> list[Ids]:
    """`encode` of each text, on all cores."""

  @abc.abstractmethod
  def decode_bytes(self, ids: Iterable[int]) -> bytes:
    """The bytes that `ids` stand for; special tokens stand for none."""

  def decode(self, ids: Iterable[int]) -> str:
    """Text of `ids`; bytes that are not UTF-8 (a character cut in two, say) show as U+FFFD."""
    return self.decode_bytes(ids).decode("utf-8", "replace")

  @abc.abstractmethod
  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files that `load_tokenizer(directory)` reads."""

  def _encode_bytes(self, run: str) -> list[int]:
    """Ids of bytes that are not UTF-8, given as surrogates, or of a SentencePiece space."""
    ids = [self._byte_ids.get(byte, self.unk_id) for byte in to_bytes(run)]
    known = [i for i in ids if i is not None]
    if len(known) < len(ids):
      raise DataError(f"the tokenizer has no piece for the bytes {to_bytes(run)[:8]!r}, nor one for what is unknown")
    return known

  @property
  def start_id(self) -> int:
    """What stands before a document's first token: BOS, or EOS where there is no BOS (as GPT-2 does)."""
    start = self.eos_id if self.bos_id is None else self.bos_id
    if start is None or self.eos_id is None:
      raise DataError(
        "the tokenizer has no end-of-text token, which separates documents; name it as eos_token "
        f"in {SPECIAL_FILE} beside it"
      )
    return start


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226)."""

  def __init__(self, model: bytes):
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    try:
      spec = model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except Exception as error:  # protobuf and the C++ side each raise their own
      raise DataError("not a SentencePiece model, or a damaged one") from error
    if not spec.pieces:
      raise DataError("a SentencePiece model without pieces")
    self._model = model
    self.fingerprint = hashlib.sha256(model).hexdigest()
    self.vocab_size = len(spec.pieces)
    ids = {name: getattr(self._processor, name)() for name in ("bos_id", "eos_id", "pad_id", "unk_id")}
    self.bos_id, self.eos_id, self.pad_id, self.unk_id = (None if i < 0 else i for i in ids.values())
    self._dummy_prefix = spec.normalizer_spec.add_dummy_prefix
    Type = model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]  # made at run time
    self._piece_bytes = []
    for piece in spec.pieces:
      if piece.type == Type.BYTE:
        data = bytes([int(piece.piece[3:5], 16)])  # "<0xE2>"
      elif piece.type == Type.CONTROL:
        data = b""
      elif piece.type == Type.UNKNOWN:
        data = (spec.trainer_spec.unk_surface or " \u2047 ").encode()
      else:
        data = piece.piece.replace(_SPACE, " ").encode()
      self._piece_bytes.append(data)
    types = [piece.type for piece in spec.pieces]
    self._byte_ids = {self._piece_bytes[i][0]: i for i, type in enumerate(types) if type == Type.BYTE}
    # A literal U+2581 would come back as a space. Where nothing else is normalized, its bytes keep it.
    self.lossless = bool(self._byte_ids) and not (
      spec.normalizer_spec.precompiled_charsmap or spec.normalizer_spec.remove_extra_whitespaces or self._dummy_prefix
    )
    self._special = _NOT_UTF8_OR_SPACE if self.lossless else _NOT_UTF8

  def __reduce__(self):
    return SentencePieceTokenizer, (self._model,)

  @functools.cached_property
  def _continuation(self):
    """Encodes text that follows a run of bytes, which must not get another dummy prefix."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    spec = model_pb2.ModelProto.FromString(self._model)  # type: ignore[attr-defined]
    spec.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())

  def encode_batch(self, texts):
    texts = [to_bytes(text).decode("utf-8", "surrogateescape") for text in texts]
    plain = [not self._special.search(text) for text in texts]
    encoded = iter(self._processor.encode([t for t, ok in zip(texts, plain) if ok], num_threads=os.cpu_count()))
    return [np.array(next(encoded) if ok else self._encode_runs(t), np.int32) for t, ok in zip(texts, plain)]

  def _encode_runs(self, text: str) -> list[int]:
    ids, processor = [], self._processor
    for index, run in enumerate(self._special.split(text)):
      if index % 2:
        ids += self._encode_bytes(run)
      elif run:
        ids += processor.encode(run)
      processor = self._continuation
    return ids

  def decode_bytes(self, ids):
    data = b"".join([self._piece_bytes[i] for i in ids])
    return data.removeprefix(b" ") if self._dummy_prefix else data

  def save(self, directory):
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / SENTENCEPIECE_FILE).write_bytes(self._model)


class HuggingFaceTokenizer(Tokenizer):
  """A `tokenizers` file. Round trips are exact for byte-level vocabularies that do not normalize."""

  # Read only where tokenizer_config.json does not say.
  _USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "[BOS]"),
    "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]", "[EOS]"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
  }

  def __init__(self, definition: str, special_tokens: dict[str, str | None] | None = None):
    """`special_tokens` maps "bos_token" and so on to token strings; what it leaves out is looked up by the
    usual names."""
    import tokenizers

    try:
      parsed = json.loads(definition)
      self._tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the Rust side raises bare Exceptions
      raise DataError("not a tokenizer.json, or a damaged one") from error
    self._tokenizer.encode_special_tokens = True  # in a document "<|endoftext|>" is text
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._definition = definition
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values()) + 1
    given = special_tokens or {}
    self._special_tokens = {
      role: given[role] if role in given else next((t for t in usual if t in vocabulary), None)
      for role, usual in self._USUAL.items()
    }
    for role, token in self._special_tokens.items():
      if token is not None and token not in vocabulary:
        raise DataError(f"{role} {token!r} is not in the tokenizer's vocabulary")
    roles = [self._special_tokens[role] for role in self._USUAL]
    self.bos_id, self.eos_id, self.pad_id, self.unk_id = (None if t is None else vocabulary[t] for t in roles)
    facts = json.dumps([definition, self._special_tokens], sort_keys=True)
    self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    alphabet = _byte_alphabet()
    self._byte_ids = {}
    self._piece_bytes: dict[int, bytes] | None = None
    if _mentions(parsed.get("decoder"), "ByteLevel"):
      self._byte_ids = {b: vocabulary[c] for c, b in alphabet.items() if c in vocabulary}
      added = {token["id"]: token for token in parsed.get("added_tokens") or ()}
      self._piece_bytes = {
        i: (b"" if added[i]["special"] else token.encode()) if i in added else bytes(alphabet[c] for c in token)
        for token, i in vocabulary.items()
        if i in added or all(c in alphabet for c in token)
      }
    elif parsed["model"].get("byte_fallback"):
      pieces = {byte: vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)}
      self._byte_ids = {byte: i for byte, i in pieces.items() if i is not None}

  def __reduce__(self):
    return HuggingFaceTokenizer, (self._definition, self._special_tokens)

  def encode_batch(self, texts):
    texts = [to_bytes(text).decode("utf-8", "surrogateescape") for text in texts]
    plain = [not (self._byte_ids and _NOT_UTF8.search(text)) for text in texts]
    # A vocabulary without byte pieces can only know such bytes as U+FFFD.
    valid = [_NOT_UTF8.sub("\ufffd", t) for t, ok in zip(texts, plain) if ok]
    encoded = iter(self._tokenizer.encode_batch_fast(valid, add_special_tokens=False))
    return [np.array(next(encoded).ids if ok else self._encode_runs(t), np.int32) for t, ok in zip(texts, plain)]

  def _encode_runs(self, text: str) -> list[int]:
    ids = []
    for index, run in enumerate(_NOT_UTF8.split(text)):
      if index % 2:
        ids += self._encode_bytes(run)
      elif run:
        ids += self._tokenizer.encode(run, add_special_tokens=False).ids
    return ids

  def decode_bytes(self, ids):
    if self._piece_bytes is None:
      return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).encode()
    return b"".join([self._piece_bytes[int(i)] for i in ids])

  def save(self, directory):
    Path(directory).mkdir(parents=True, exist_ok=True)
    (Path(directory) / HUGGINGFACE_FILE).write_text(self._definition, encoding="utf-8")
    (Path(directory) / SPECIAL_FILE).write_text(json.dumps(self._special_tokens, indent=2), encoding="utf-8")


def _mentions(node: Any, type_name: str) -> bool:
  """Whether a component of a tokenizer.json is, or contains, one of this type."""
  if isinstance(node, dict):
    return node.get("type") == type_name or any(_mentions(child, type_name) for child in node.values())
  return isinstance(node, list) and any(_mentions(child, type_name) for child in node)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
  """GPT-2's printable character for each byte (`bytes_to_unicode` of its encoder.py), inverted."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
  """Reads a SentencePiece model file, a tokenizer.json, or a directory that holds either.

  Raises DataError when there is none, or when it is damaged.
  """
  path = Path(path).expanduser()
  if path.is_dir():
    found = [path / name for name in (HUGGINGFACE_FILE, SENTENCEPIECE_FILE) if (path / name).is_file()]
    found = found or sorted(path.glob("*.model"))
    if not found:
      raise DataError(f"no tokenizer in {path}: it needs a {HUGGINGFACE_FILE} or a SentencePiece .model")
    path = found[0]
  try:
    data = path.read_bytes()
  except OSError as error:
    raise DataError(f"cannot read the tokenizer {path}: {error.strerror}; mend data.tokenizer.path") from error
  try:
    if path.suffix == ".json":
      return HuggingFaceTokenizer(data.decode(), _special_tokens_beside(path))
    return SentencePieceTokenizer(data)
  except (DataError, UnicodeDecodeError) as error:
    raise DataError(f"cannot load the tokenizer {path}: {error}") from error


def _special_tokens_beside(path: Path) -> dict[str, str | None]:
  """bos_token and so on from the tokenizer_config.json next to a tokenizer.json, where there is one."""
  config = path.with_name(SPECIAL_FILE)
  if not config.is_file():
    return {}
  try:
    settings = json.loads(config.read_bytes())
  except ValueError as error:
    raise DataError(f"{config} is not JSON") from error
  tokens = {role: settings[role] for role in HuggingFaceTokenizer._USUAL if role in settings}
  return {role: token["content"] if isinstance(token, dict) else token for role, token in tokens.items()}

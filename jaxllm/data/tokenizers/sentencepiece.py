"""SentencePiece models (Kudo and Richardson 2018, arXiv 1808.06226)."""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxllm.base.errors import DataError, shown
from jaxllm.data.tokenizers.base import CANNOT, NOT_UTF8, ROLES, Tokenizer, damaged, settings_file, token_text
from jaxllm.data.tokenizers.classes import CLASSES
from jaxllm.data.tokenizers.from_sentencepiece import from_sentencepiece
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer, mentions

SENTENCEPIECE_FILE = "tokenizer.model"
FLAGS = "single_word", "lstrip", "rstrip", "normalized"
THREADS = os.cpu_count() or 1  # that encode a batch; a process beside others takes one
_SPACE = "\u2581"  # SentencePiece writes spaces so inside its pieces
_NOT_UTF8_OR_SPACE = re.compile(f"([\udc80-\udcff{_SPACE}]+)")


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model, and tokens that its settings add to it."""

  def __init__(self, model: bytes, settings: dict[str, Any] | None = None):
    """`settings` is what stands in tokenizer_config.json."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    with damaged("not a SentencePiece model, or a damaged one"):  # protobuf and the C++ side each raise their own
      spec = model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if not spec.pieces:
      raise DataError("a SentencePiece model without pieces")
    self.model, self.settings = model, dict(settings or {})
    self._dummy_prefix = spec.normalizer_spec.add_dummy_prefix
    self._class = self.settings.get("tokenizer_class")
    Type = model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]  # made at run time
    self._piece_bytes = []
    for piece in spec.pieces:
      if piece.type == Type.BYTE:
        data = bytes([int(piece.piece[3:5], 16)])  # "<0xE2>"
      elif piece.type == Type.CONTROL or (piece.type == Type.UNKNOWN and self._class is not None):
        data = b""  # of a class what is unknown is a special token, as in transformers
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
    self._byte_runs = _NOT_UTF8_OR_SPACE if self.lossless else NOT_UTF8

    self.added_tokens = _added_tokens(self.settings, len(types))
    for i, token in self.added_tokens.items():  # beyond the model's pieces, or in place of one
      self._piece_bytes += [b""] * (i + 1 - len(self._piece_bytes))
      self._piece_bytes[i] = b"" if token["special"] else token["content"].encode()
    self.vocab_size = len(self._piece_bytes)
    declared = CLASSES[self._class].model["type"] if self._class in CLASSES else None
    merges = spec.trainer_spec.model_type != spec.trainer_spec.UNIGRAM
    self._merges = merges if declared is None else declared == "BPE"
    ids = {piece.piece: i for i, piece in enumerate(spec.pieces)}
    ids |= {token["content"]: i for i, token in self.added_tokens.items()}
    own = {f"{role}_token": getattr(self._processor, f"{role}_id")() for role in ("bos", "eos", "pad", "unk")}
    tokens = {role: spec.pieces[i].piece for role, i in own.items() if i >= 0}
    tokens |= {role: token_text(self.settings[role]) for role in ROLES if role in self.settings}
    tokens = {role: token for role, token in tokens.items() if token is not None}
    for role, token in tokens.items():
      if token not in ids:
        raise DataError(f"{role} {shown(token)} is not in the tokenizer's vocabulary")
    self._set_special(tokens, {role: ids[token] for role, token in tokens.items()})
    self.special_ids = frozenset(
      {ids[token] for token in tokens.values()}
      | {i for i, type in enumerate(types) if type == Type.CONTROL}
      | {i for i, token in self.added_tokens.items() if token["special"]}
    )
    facts: list[Any] = [
      [(i, t["content"]) for i, t in self.added_tokens.items() if not t["special"]],
      self.bos_id,
      self.eos_id,
    ]
    if self._class is not None:
      flags = [[i, *(bool(t.get(flag)) for flag in FLAGS)] for i, t in self.added_tokens.items()]
      facts += [self._class, *map(self.settings.get, ("legacy", "add_prefix_space", "do_lower_case")), flags]
    default: list[Any] = [[], *(None if own[role] < 0 else own[role] for role in ("bos_token", "eos_token"))]
    self.fingerprint = hashlib.sha256(model + (b"" if facts == default else json.dumps(facts).encode())).hexdigest()
    # In a prompt, special and added tokens are themselves.
    control = {spec.pieces[i].piece for i, type in enumerate(types) if type == Type.CONTROL} | set(tokens.values())
    self._ids = {text: ids[text] for text in control | {t["content"] for t in self.added_tokens.values()}}

  @functools.cached_property
  def _drops_space(self) -> bool:
    """Whether the space that a text begins with is not the text's own."""
    if self._class not in CLASSES:
      return self._dummy_prefix
    decoder = CLASSES[self._class].parts(self.settings, {})["decoder"]
    return mentions(decoder, "Strip") or decoder.get("prepend_scheme", "never") != "never"

  @functools.cached_property
  def _spelled(self) -> dict[int, str]:
    return {i: token for token, i in self._ids.items()}

  def __reduce__(self):
    return SentencePieceTokenizer, (self.model, self.settings)

  @functools.cached_property
  def _continuation(self):
    """Encodes text that follows a run of bytes, which must not get another dummy prefix."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2

    spec = model_pb2.ModelProto.FromString(self.model)  # type: ignore[attr-defined]
    spec.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())

  @functools.cached_property
  def as_class(self) -> HuggingFaceTokenizer | None:
    """What the class of the settings makes of the model, which then encodes; None where none is named."""
    if self._class is None:
      return None
    added = {str(i): dict(token) for i, token in self.added_tokens.items()}
    settings = self.settings | {"added_tokens_decoder": added}
    with damaged("a SentencePiece model that its class cannot take"):
      definition, settings = from_sentencepiece(self.model, self._class, settings)
      return HuggingFaceTokenizer(definition, settings)

  def _encode_plain(self, texts):
    if self.as_class is not None:
      return self.as_class._encode_plain(texts)
    if not self._added_text:
      return self._processor.encode(texts, num_threads=THREADS)
    return [self._encode_parsing(text, self._added_text) for text in texts]

  def _encode_run(self, text, follows):
    if self.as_class is not None:
      return self.as_class._encode_run(text, follows)
    return (self._continuation if follows else self._processor).encode(text)

  @property
  def frame_ids(self) -> tuple[int | None, int | None]:
    """What stands before a text and behind it: Llama's rule; T5's where there is no BOS."""
    begins = self.settings.get("add_bos_token", self.bos_id is not None)
    ends = self.settings.get("add_eos_token", self.bos_id is None)
    return self.bos_id if begins else None, self.eos_id if ends else None

  def encode_pair(self, first, second=None, *, add_special=True):
    if self.as_class is not None:
      return self.as_class.encode_pair(first, second, add_special=add_special)
    bos, eos = ([] if id is None else [id] for id in self.frame_ids)
    ids = []
    for text in (first,) if second is None else (first, second):
      with damaged(CANNOT):
        parsed = self._encode_parsing(text)
      ids += [*bos, *parsed, *eos] if add_special else parsed
    return np.array(ids, np.int32), np.zeros(len(ids), np.int32)

  def _encode_parsing(self, text: str, tokens: re.Pattern | None = None) -> list[int]:
    """Ids of a text in which some tokens are themselves; None: all that are no plain pieces."""
    ids, processor = [], self._processor
    for index, run in enumerate((tokens or self._tokens_in_text).split(text)):
      if index % 2:
        ids.append(self._ids[run])
      elif run:
        ids += self._encode_runs(run) if self.lossless else processor.encode(run)
      # transformers' "legacy" tokenizers begin afresh, with a dummy prefix, behind a special token.
      if not self.settings.get("legacy", True):
        processor = self._continuation
    return ids

  @functools.cached_property
  def _tokens_in_text(self) -> re.Pattern:
    return _any_of(self._ids)

  @functools.cached_property
  def _added_text(self) -> re.Pattern | None:
    """The added tokens that stand for text, which are themselves in documents too."""
    added = [token["content"] for token in self.added_tokens.values() if not token["special"]]
    return _any_of(added) if added else None

  def encode_chats(self, texts):
    if self.as_class is not None:
      return self.as_class.encode_chats(texts)
    with damaged(CANNOT):
      return [self._encode_with_positions(text) for text in texts]

  def _encode_with_positions(self, text: str):
    """Pieces laid along the text, which they spell but for the dummy prefix, or something normalizes it."""
    ids, data = self._encode_parsing(text), text.encode()
    characters = np.append(np.repeat(np.arange(len(text)), [len(char.encode()) for char in text]), len(text))
    edges = [0]
    for i in ids:
      piece = self._spelled[i].encode() if i in self._spelled else self._piece_bytes[i]
      piece = piece if data.startswith(piece, edges[-1]) else piece.removeprefix(b" ")
      edges.append(edges[-1] + len(piece) if data.startswith(piece, edges[-1]) else len(data) + 1)
      if edges[-1] > len(data):
        break
    if edges[-1] != len(data):
      near = data[edges[-2] if len(edges) > 1 else 0 :][:20].decode(errors="replace")
      raise DataError(f"the tokenizer changes text before it reads it, so that tokens have no places in it: {near!r}")
    begins, ends = characters[edges[:-1]], characters[np.maximum(edges[1:], 1) - 1] + 1
    return np.array(ids, np.int32), np.stack([begins, np.maximum(begins, ends)], axis=1).astype(np.int32)

  def token_text(self, id):
    if (known := self._spelled.get(int(id))) or not 0 <= id < self._processor.vocab_size():
      return known or ""
    return self._processor.id_to_piece(int(id)).replace(_SPACE, " ")

  def decode_bytes(self, ids):
    data = b"".join([self._piece_bytes[i] for i in ids if 0 <= i < self.vocab_size])
    return data.removeprefix(b" ") if self._drops_space else data

  def pieces(self):
    return self._piece_bytes

  def with_settings(self, settings):
    return SentencePieceTokenizer(self.model, settings)

  def files(self):
    return {SENTENCEPIECE_FILE: self.model} | settings_file(self.settings)


def _any_of(tokens: Iterable[str]) -> re.Pattern:
  return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")


def _added_tokens(settings: dict[str, Any], pieces: int) -> dict[int, dict[str, Any]]:
  """Id to {"content", "special"} of the tokens that tokenizer_config.json adds to a model's pieces."""
  added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
  if not added:  # T5 counts its sentinels from the end of the vocabulary
    count = settings.get("extra_ids", 100 if settings.get("tokenizer_class") == "T5Tokenizer" else 0)
    added = {pieces + count - 1 - n: {"content": f"<extra_id_{n}>", "special": True} for n in range(count)}
  return {i: {"special": False} | added[i] for i in sorted(added)}

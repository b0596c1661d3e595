"""Tokenizer files of the `tokenizers` library.

Round trips are exact for byte-level vocabularies that do not normalize.
"""

import functools
import hashlib
import json
from typing import Any

import numpy as np

from jaxllm.base.errors import DataError
from jaxllm.base.strangers import parse_json
from jaxllm.data.tokenizers.base import (
  CANNOT,
  NOT_UTF8,
  NOTHING,
  ROLES,
  Tokenizer,
  damaged,
  settings_file,
  special_of,
  token_text,
)
from jaxllm.data.tokenizers.settings import MAX_TOKENS

HUGGINGFACE_FILE = "tokenizer.json"
# Looked for only where tokenizer_config.json names none of them, and no class.
_USUAL = {
  "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]", "[BOS]"),
  "eos_token": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]", "[EOS]"),
  "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
  "unk_token": ("<unk>", "[UNK]"),
  "mask_token": ("<mask>", "[MASK]"),
  "cls_token": ("[CLS]",),
  "sep_token": ("[SEP]",),
}


class HuggingFaceTokenizer(Tokenizer):
  """A tokenizer.json: byte-level BPE, BPE with byte fallback, WordPiece or Unigram."""

  def __init__(self, definition: str | dict[str, Any], settings: dict[str, Any] | None = None, parsed: Any = None):
    """`definition` is what stands in tokenizer.json, or spelt there; `settings` in tokenizer_config.json: special
    tokens ("bos_token" and so on; what it leaves out is looked up by the usual names), chat templates, …. `parsed` is
    what the text `definition` spells, for a caller that has read it.
    """
    if isinstance(definition, dict):
      definition, parsed = json.dumps(definition, ensure_ascii=False), definition
    self._definition, self.settings = definition, dict(settings or {})
    parsed = parse_json(definition, "it", DataError) if parsed is None else parsed
    with damaged("not a tokenizer.json, or a damaged one"):
      self._tokenizer = self._build()
      vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    self.vocab_size = max(vocabulary.values(), default=MAX_TOKENS) + 1
    if self.vocab_size > MAX_TOKENS:
      raise DataError("a tokenizer.json without tokens, or with ids that no vocabulary has")
    self._merges = parsed["model"].get("type", "BPE" if "merges" in parsed["model"] else None) == "BPE"
    roles = self._roles(vocabulary)
    self._set_special(
      {role: token for role, token in roles.items() if token is not None},
      {role: vocabulary[token] for role, token in roles.items() if token is not None},
    )
    added = self._tokenizer.get_added_tokens_decoder()
    self.special_ids = frozenset(i for i, token in added.items() if token.special)
    text = {i: token.content for i, token in added.items() if not token.special}
    documents = [definition, {role: roles.get(role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}]
    own = {token["id"] for token in parsed.get("added_tokens") or ()}
    if later := sorted((i, content) for i, content in text.items() if i not in own):
      documents.append(later)
    self.fingerprint = hashlib.sha256(json.dumps(documents, sort_keys=True).encode()).hexdigest()

    alphabet = byte_alphabet()
    self._byte_ids = {}
    self._piece_bytes: dict[int, bytes] | None = None
    if mentions(parsed.get("decoder"), "ByteLevel"):
      self._byte_ids = {b: vocabulary[c] for c, b in alphabet.items() if c in vocabulary}
      # A piece with another character stands for itself, as in the library.
      spelled = lambda t: bytes(alphabet[c] for c in t) if alphabet.keys() >= set(t) else t.encode()  # noqa: E731
      self._piece_bytes = {i: spelled(token) for token, i in vocabulary.items()}
      self._piece_bytes |= {i: content.encode() for i, content in text.items()} | dict.fromkeys(self.special_ids, b"")
    elif parsed["model"].get("byte_fallback"):
      pieces = {byte: vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)}
      self._byte_ids = {byte: i for byte, i in pieces.items() if i is not None}
    self._byte_runs = NOT_UTF8 if self._byte_ids else NOTHING

  def _build(self):
    """The `tokenizers` object, with the tokens of the settings in it; it reads special tokens in text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(self._definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    own = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for i, token in sorted(self.settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
      if token["content"] not in own or tokenizer.id_to_token(int(i)) != token["content"]:
        tokenizer.add_tokens([tokenizers.AddedToken(**token)])
        if tokenizer.token_to_id(token["content"]) != int(i):
          raise DataError(f"added token {token['content']!r} cannot have id {i}: the vocabulary has another there")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {token: {} for token in self._roles(vocabulary).values() if token is not None}
    for token in special_of(self.settings):
      special.setdefault(token_text(token) or "", {}).update(token if isinstance(token, dict) else {})
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    new = [(token, flags) for token, flags in special.items() if token in vocabulary and token not in known]
    plain = {"normalized": False, "special": True}
    made = [tokenizers.AddedToken(**{**plain, **flags, "content": token, "special": True}) for token, flags in new]
    tokenizer.add_special_tokens(made)
    return tokenizer

  @functools.cached_property
  def _plain(self):
    """Another `tokenizers` object for documents, in which "<|endoftext|>" is text."""
    import tokenizers

    with damaged("not a tokenizer.json, or a damaged one"):
      tokenizer = self._build()
      tokenizer.encode_special_tokens = True
      definition = json.loads(tokenizer.to_str())
      if definition["model"]["type"] == "Unigram":  # finds any piece in text, "</s>" too, unless it has another name
        pieces, added = definition["model"]["vocab"], definition["added_tokens"]
        for i in self.special_ids & set(range(len(pieces))) - {definition["model"]["unk_id"]}:
          pieces[i][0] = f"\U0010fffe{i}\U0010fffe"  # no character, so in no text
        definition["added_tokens"] = [token for token in added if token["id"] not in self.special_ids]
        definition["post_processor"] = None
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
      return tokenizer

  def _roles(self, vocabulary: dict[str, int]) -> dict[str, str | None]:
    """The token of each role, None where it has none."""
    given = {role: token_text(self.settings[role]) for role in ROLES if role in self.settings}
    for role, token in given.items():
      if token is not None and token not in vocabulary:
        raise DataError(f"{role} {token!r} is not in the tokenizer's vocabulary")
    if "tokenizer_class" in self.settings or any(token is not None for token in given.values()):
      return given
    return {role: next((t for t in usual if t in vocabulary), None) for role, usual in _USUAL.items()} | given

  def __reduce__(self):
    return HuggingFaceTokenizer, (self._definition, self.settings)

  def _encode_plain(self, texts):
    # A vocabulary without byte pieces can only know bytes that are not UTF-8 as U+FFFD.
    valid = [NOT_UTF8.sub("\ufffd", text) for text in texts]
    with damaged(CANNOT):
      return [encoded.ids for encoded in self._plain.encode_batch_fast(valid, add_special_tokens=False)]

  def _encode_run(self, text, follows):
    with damaged(CANNOT):
      return self._plain.encode(text, add_special_tokens=False).ids

  def encode_pair(self, first, second=None, *, add_special=True):
    with damaged(CANNOT):
      encoded = self._tokenizer.encode(first, second, add_special_tokens=add_special)
    return np.array(encoded.ids, np.int32), np.array(encoded.type_ids, np.int32)

  @functools.cached_property
  def _untrimmed(self):
    """Another `tokenizers` object, whose positions count the spaces that tokens begin with."""
    import tokenizers

    tokenizer = self._build()
    tokenizer.post_processor = tokenizers.processors.Sequence([])
    return tokenizer

  def encode_chats(self, texts):
    with damaged(CANNOT):
      encoded = self._untrimmed.encode_batch(list(texts), add_special_tokens=False)
    return [(np.array(one.ids, np.int32), np.array(one.offsets, np.int32).reshape(-1, 2)) for one in encoded]

  def token_text(self, id):
    return self._tokenizer.id_to_token(int(id)) or "" if 0 <= id < self.vocab_size else ""

  def decode_bytes(self, ids):
    if self._piece_bytes is None:
      with damaged("the tokenizer cannot decode these tokens"):
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True).encode()
    return b"".join([self._piece_bytes.get(int(i), b"") for i in ids])

  def pieces(self):
    if self._piece_bytes is not None:
      return [self._piece_bytes.get(i, b"") for i in range(self.vocab_size)]
    model = json.loads(self._definition)["model"]
    prefix = model.get("continuing_subword_prefix") if model.get("type") == "WordPiece" else None

    def text(token: str) -> str:
      if prefix is None:
        return token.replace("\u2581", " ")
      return token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"

    special = dict.fromkeys(self.special_ids, b"") | {i: bytes([byte]) for byte, i in self._byte_ids.items()}
    tokens = (self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size))
    return [special.get(i, text(token).encode()) for i, token in enumerate(tokens)]

  def with_settings(self, settings):
    return HuggingFaceTokenizer(self._definition, settings)

  def files(self):
    # The class by which transformers loads any tokenizer.json.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens, **self.settings}
    return {HUGGINGFACE_FILE: self._definition.encode()} | settings_file(settings)


def mentions(node: Any, type_name: str) -> bool:
  """Whether a component of a tokenizer.json is, or contains, one of this type."""
  if isinstance(node, dict):
    return node.get("type") == type_name or any(mentions(child, type_name) for child in node.values())
  return isinstance(node, list) and any(mentions(child, type_name) for child in node)


@functools.cache
def byte_alphabet() -> dict[str, int]:
  """GPT-2's printable character for each byte (`bytes_to_unicode` of its encoder.py), inverted."""
  printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
  others = [byte for byte in range(256) if byte not in printable]
  return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}

"""A SentencePiece model as a tokenizer.json, for programs that read no other."""

from typing import Any

from jaxllm.data.tokenizers.base import Tokenizer
from jaxllm.data.tokenizers.huggingface import HuggingFaceTokenizer
from jaxllm.data.tokenizers.sentencepiece import SentencePieceTokenizer

# What they say of a SentencePiece model, the tokenizer.json says itself.
_BAKED = ("tokenizer_class", "add_bos_token", "add_eos_token", "legacy", "sp_model_kwargs", "extra_ids")


def as_huggingface(tokenizer: Tokenizer) -> HuggingFaceTokenizer:
  """A tokenizer that encodes and decodes alike and is saved as a tokenizer.json.

  Its pieces are spelt with spaces and not with SentencePiece's U+2581, so that this character in a text
  stays what it is. Of two divisions of a text that a unigram model finds equally good (five spaces as one
  and four, say) the two libraries may choose different ones; and where a model trims or adds spaces, those next
  to tokens that a user defined may differ.
  """
  if isinstance(tokenizer, HuggingFaceTokenizer):
    return tokenizer
  assert isinstance(tokenizer, SentencePieceTokenizer)
  if tokenizer.as_class is not None:
    return tokenizer.as_class
  from sentencepiece import sentencepiece_model_pb2 as model_pb2
  from tokenizers import AddedToken, decoders, processors
  from tokenizers import Tokenizer as Rust

  spec = model_pb2.ModelProto.FromString(tokenizer.model)  # type: ignore[attr-defined]
  Type = model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]
  rust = Rust(_model(spec))
  normalizer = _normalizer(spec.normalizer_spec, tokenizer.lossless)
  if normalizer is not None:
    rust.normalizer = normalizer
  steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
  if spec.normalizer_spec.add_dummy_prefix:
    steps.append(decoders.Strip(content=" ", left=1))
  rust.decoder = decoders.Sequence(steps)
  for i, piece in enumerate(spec.pieces):
    if piece.type == Type.CONTROL or (piece.type == Type.UNKNOWN and i == tokenizer.unk_id):
      rust.add_special_tokens([AddedToken(piece.piece, normalized=False)])
    elif piece.type == Type.USER_DEFINED:
      rust.add_tokens([AddedToken(_spelt(piece.piece), normalized=False)])
  for token in tokenizer.added_tokens.values():
    rust.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])

  used = zip(("bos_token", "eos_token"), tokenizer.frame_ids)
  roles = [role for role, id in used if id is not None]
  ends = {tokenizer.special_tokens[role]: rust.token_to_id(tokenizer.special_tokens[role]) for role in roles}
  first, last = (tokenizer.special_tokens[r] + " " if r in roles else "" for r in ("bos_token", "eos_token"))
  if ends:
    single = f"{first}$A {last}".strip()
    rust.post_processor = processors.TemplateProcessing(
      single, f"{single} {single.replace('$A', '$B')}", [*ends.items()]
    )
  settings = {name: value for name, value in tokenizer.settings.items() if name not in _BAKED}
  settings = {"clean_up_tokenization_spaces": False} | settings | tokenizer.special_tokens
  return HuggingFaceTokenizer(rust.to_str(), settings)


def _spelt(piece: str) -> str:
  return piece.replace("\u2581", " ")


def _model(spec: Any) -> Any:
  """The `tokenizers` model with the pieces of a SentencePiece one."""
  from tokenizers import models

  vocabulary = [(_spelt(piece.piece), piece.score) for piece in spec.pieces]
  unknown = spec.trainer_spec.unk_id
  byte_fallback = bool(spec.trainer_spec.byte_fallback)
  if spec.trainer_spec.model_type == spec.trainer_spec.UNIGRAM:
    return models.Unigram(vocabulary, unknown, byte_fallback)
  ids = {piece: i for i, (piece, _) in enumerate(vocabulary)}
  merges = []
  # SentencePiece joins the pair whose whole has the best score; here that is the order of the merges.
  normal = [(score, piece) for piece, score in vocabulary if len(piece) > 1]
  for _, piece in sorted(normal, key=lambda entry: -entry[0]):
    pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
    merges += sorted((p for p in pairs if p[0] in ids and p[1] in ids), key=lambda p: (ids[p[0]], ids[p[1]]))
  return models.BPE(ids, merges, unk_token=vocabulary[unknown][0], fuse_unk=True, byte_fallback=byte_fallback)


def _normalizer(spec: Any, lossless: bool) -> Any:
  from tokenizers import Regex, normalizers

  steps: list[Any] = []
  if spec.precompiled_charsmap:
    steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
  if not lossless:
    steps.append(normalizers.Replace("\u2581", " "))
  if spec.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex(" +"), " "), normalizers.Strip(left=True, right=True)]
  if spec.add_dummy_prefix:
    steps.append(normalizers.Prepend(" "))
  return normalizers.Sequence(steps) if steps else None

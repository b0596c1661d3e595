"""A SentencePiece model as the tokenizer.json that the class of its settings makes of it."""

import base64
import json
import re
from typing import Any

from jaxllm.base.errors import DataError
from jaxllm.data.tokenizers.base import token_text
from jaxllm.data.tokenizers.classes import CLASSES, SPACE, Json, as_class

# Classes that give the pieces other ids than the model has, and the languages that they put behind them.
_FIRST = ("bos_token", "pad_token", "eos_token", "unk_token")
_MBART = """ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP
  nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"""
_MBART50 = """af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE
  sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"""
_SHIFTED = {"XLMRobertaTokenizer": "", "MBartTokenizer": _MBART, "MBart50Tokenizer": f"{_MBART} {_MBART50}"}
_OTHERS = ("Camembert", "M2M100", "Nllb", "Pegasus", "XGLM", "Barthez", "Marian", "SeamlessM4T")


def from_sentencepiece(model: bytes, name: str, settings: Json) -> tuple[Json, Json]:
  """The tokenizer.json and its settings.

  Args:
    name: the tokenizer's class.

  Raises:
    DataError: the class is known to change ids in a way that is not known here.
  """
  from sentencepiece import sentencepiece_model_pb2 as model_pb2

  if name.removesuffix("Tokenizer") in _OTHERS:
    if name == "M2M100Tokenizer":  # nor has it a tokenizer.json
      raise DataError(f"a {name} has pieces of its model and ids of vocab.json, which is not read here")
    raise DataError(f"a {name} has other ids than its model; save the tokenizer as a tokenizer.json")
  spec = model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
  Type = model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]
  if name in _SHIFTED and isinstance(settings.get("mask_token", ""), str):
    mask = settings.get("mask_token") or CLASSES[name].defaults["mask_token"]
    settings = settings | {"mask_token": {"content": mask, "lstrip": True}}
  if name in CLASSES:
    definition = {"model": _model(name, spec, settings), "normalizer": _table(spec)}
  else:
    definition, settings = _as_its_model_says(spec, settings, Type), _of_its_model(spec, settings)
  vocabulary = definition["model"]["vocab"]
  ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}
  kept = {
    piece.piece: piece.type == Type.CONTROL for piece in spec.pieces if piece.type in (Type.CONTROL, Type.USER_DEFINED)
  } | dict.fromkeys(_SHIFTED.get(name, "").split(), True)
  flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
  added = [
    {"id": ids[text], "content": text, **flags, "special": special} for text, special in kept.items() if text in ids
  ]
  frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
  return as_class(name, frame | definition, settings, whole=False)


def _model(name: str, spec: Any, settings: Json) -> Json:
  """The vocabulary as a class takes it."""
  kind = CLASSES[name]
  pieces: list[tuple[str, float]] = [(piece.piece, piece.score) for piece in spec.pieces]
  token = lambda role: token_text(settings.get(role)) or kind.defaults[role]  # noqa: E731
  if kind.model["type"] == "BPE":
    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    unknown = token("unk_token") if name == "GemmaTokenizer" else None
    return kind.model | {"dropout": None, "unk_token": unknown, "vocab": vocab, "merges": _merges(vocab)}
  if name in _SHIFTED:
    last = [*_SHIFTED[name].split(), token("mask_token")]
    pieces = [*((token(role), 0.0) for role in _FIRST), *pieces[3:], *((text, 0.0) for text in last)]
  if name == "T5Tokenizer":
    pieces += [(f"<extra_id_{n}>", 0.0) for n in reversed(range(settings.get("extra_ids", 100)))]
  unknown_id = next((i for i, (piece, _) in enumerate(pieces) if piece == token("unk_token")), spec.trainer_spec.unk_id)
  return kind.model | {"unk_id": unknown_id, "vocab": [list(piece) for piece in pieces]}


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
  """All ways of joining two pieces to a third, in the order of the third's ids."""
  cuts = ((piece[:cut], piece[cut:]) for piece in vocab for cut in range(1, len(piece)))
  return [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]


def _table(spec: Any) -> Json | None:
  table = spec.normalizer_spec.precompiled_charsmap
  return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()} if table else None


def _of_its_model(spec: Any, settings: Json) -> Json:
  """Settings with the model's own tokens, and added tokens that are found in the text as it was."""
  trainer, own = spec.trainer_spec, ("bos", "eos", "unk")
  settings = {f"{r}_token": getattr(trainer, f"{r}_piece") for r in own if getattr(trainer, f"{r}_id") >= 0} | settings
  found = settings.get("added_tokens_decoder", {})
  if not spec.normalizer_spec.add_dummy_prefix:
    return settings
  return settings | {"added_tokens_decoder": {i: token | {"normalized": False} for i, token in found.items()}}


def _as_its_model_says(spec: Any, settings: Json, Type: Any) -> Json:
  """Where no class says otherwise: SentencePiece's own way, but for what stands behind added tokens (`legacy`)."""
  from tokenizers import Regex, decoders, normalizers
  from tokenizers import pre_tokenizers as cut

  trainer, rules = spec.trainer_spec, spec.normalizer_spec
  names = {int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
  kept = {piece.piece for i, piece in enumerate(spec.pieces) if i not in names}
  texts = [names[i] if names.get(i, piece.piece) not in kept else piece.piece for i, piece in enumerate(spec.pieces)]
  own = [texts[i] for i, piece in enumerate(spec.pieces) if piece.type == Type.USER_DEFINED]
  model: Json
  if trainer.model_type == trainer.UNIGRAM:
    vocab: Any = [[piece.piece, piece.score] for piece in spec.pieces]
    model = {"type": "Unigram", "unk_id": trainer.unk_id, "vocab": vocab, "byte_fallback": trainer.byte_fallback}
  else:
    normal = {texts[i]: (-p.score, i) for i, p in enumerate(spec.pieces) if p.type == Type.NORMAL}
    pairs = ((rank, piece[:at], piece[at:]) for piece, rank in normal.items() for at in range(1, len(piece)))
    merges = sorted((rank, left, right) for rank, left, right in pairs if left in normal and right in normal)
    model = {"type": "BPE", "dropout": None, "unk_token": trainer.unk_piece, "fuse_unk": True}
    model |= {"byte_fallback": trainer.byte_fallback, "ignore_merges": bool(own)}
    model |= {"vocab": {text: i for i, text in enumerate(texts)}, "merges": [pair[1:] for pair in merges]}
  steps: list[Any] = []
  legacy = settings.get("legacy", True)
  if rules.remove_extra_whitespaces:
    steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
  if rules.escape_whitespaces:
    steps.append(normalizers.Replace(" ", SPACE))
  if rules.add_dummy_prefix and legacy:  # which Metaspace leaves out before U+2581, and SentencePiece does not
    steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), 2 * SPACE))
  cutters: list[Any] = []
  if rules.add_dummy_prefix:
    cutters.append(cut.Metaspace(SPACE, prepend_scheme="always" if legacy else "first", split=False))
  if own:
    pattern = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
    cutters.append(cut.Split(Regex(pattern), behavior="isolated"))
  out: list[Any] = [decoders.Replace(SPACE, " "), *[decoders.ByteFallback()] * trainer.byte_fallback]
  if rules.add_dummy_prefix:
    out += [decoders.Fuse(), decoders.Strip(content=" ", left=1)]
  elif trainer.byte_fallback:
    out.append(decoders.Fuse())
  parts = [json.loads(step.__getstate__()) for step in steps]
  table = _table(spec)
  return {
    "model": model,
    "normalizer": {"type": "Sequence", "normalizers": [*[table] * (table is not None), *parts]},
    "pre_tokenizer": json.loads(cut.Sequence(cutters).__getstate__()) if cutters else None,
    "decoder": json.loads(decoders.Sequence(out).__getstate__()),
  }

"""A tokenizer as GGUF metadata; the inverse of `jaxllm.interop.gguf.tokenizer`, whose names stand for the same."""

import base64
import json
import logging
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import DataError
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.interop.gguf import tokenizer as names
from jaxllm.interop.gguf.tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from jaxllm.interop.gguf.wordpiece import STRIP, write_wordpiece

log = logging.getLogger("jaxllm")
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_NOTHING = {"String": " "}, "MergedWithPrevious"  # how Gemma's cuts text, in which there are no spaces any more


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int, generation: Mapping[str, Any]) -> dict[str, Any]:
  """The GGUF metadata of a tokenizer, filled up to the model's `vocab_size`.

  What llama.cpp will read in another way, though not in every text, is logged as warnings.

  Args:
    generation: eos_token_id (one or a list), bos_token_id, …, which overrule the tokenizer's.

  Raises:
    DataError: llama.cpp has no tokenizer like this one.
  """
  files, definition = tokenizer.files(), {}
  if "tokenizer.json" in files:
    definition = json.loads(files["tokenizer.json"])
    added = list(definition.get("added_tokens") or ())
    model = definition["model"]
    if model.get("type") == "WordPiece":
      return _wordpiece_metadata(tokenizer, definition, vocab_size)
    if model.get("type") == "Unigram":
      entries = _unigram_metadata(definition, vocab_size)
    else:
      entries = (_fallback_metadata if model.get("byte_fallback") else _bpe_metadata)(definition, vocab_size)
  else:
    decoder = tokenizer.settings.get("added_tokens_decoder", {})
    added = list(decoder.values())
    entries = _sentencepiece_metadata(files["tokenizer.model"], decoder, vocab_size)
    if entries["tokenizer.ggml.add_space_prefix"] and not tokenizer.settings.get("legacy", True):
      _warn("the tokenizer puts no space behind special tokens (legacy: false), where llama.cpp puts one")
  if entries["tokenizer.ggml.model"] == "t5" and (entries["tokenizer.ggml.token_type"] == BYTE).any():
    _warn("the tokenizer makes bytes of characters that are no piece, of which llama.cpp makes <unk>")
  for flag in ("lstrip", "rstrip", "single_word"):
    if stripped := [token["content"] for token in added if token.get(flag)]:
      _warn(f"{flag} of added tokens ({', '.join(map(repr, stripped[:3]))}) means nothing to llama.cpp")
  ids = {role: generation.get(f"{role}_token_id") for role in names.ROLES}
  ids = {role: getattr(tokenizer, f"{role}_id") if i is None else i for role, i in ids.items()}
  ids |= _ends(tokenizer, ids["eos"] if isinstance(ids["eos"], list) else [ids["eos"]])
  keys = names.ROLES | {"eot": "eot", "eom": "eom"}
  entries |= {f"tokenizer.ggml.{keys[role]}_token_id": i for role, i in ids.items() if i is not None}
  return entries | _frame(tokenizer, ids) | _between(definition) | _templates(tokenizer)


def _warn(message: str) -> None:
  log.warning("GGUF: %s; texts in which that matters become other tokens there", message)


def _ends(tokenizer: Tokenizer, ends: list[int | None]) -> dict[str, int | None]:
  """`eos`, `eot` and `eom`, at each of which llama.cpp stops: the ends that are given, and that of the template."""
  turn = tokenizer.end_of_turn_id
  ends = list(dict.fromkeys(i for i in (*ends, turn) if i is not None))
  later = sorted(ends[1:], key=lambda i: i != turn)
  unsaid = [tokenizer.token_text(i) for i in later[2:] if tokenizer.token_text(i) not in names.TURN_ENDS]
  if unsaid:
    log.warning("GGUF: only three tokens can end a text there, so that %s does not", ", ".join(map(repr, unsaid)))
  return dict(zip(("eos", "eot", "eom"), [*ends[:1], *later]))


def _frame(tokenizer: Tokenizer, ids: Mapping[str, Any]) -> dict[str, Any]:
  """What stands around a prompt: as the tokenizer does it, whatever its settings say.

  Raises:
    DataError: other tokens than one and EOS.
  """
  inner, whole = (tokenizer.encode_prompt("a", add_special=special).tolist() for special in (False, True))
  at = next(i for i in range(len(whole) + 1) if whole[i : i + len(inner)] == inner)
  before, behind = whole[:at], whole[at + len(inner) :]
  if len(before) > 1 or (behind and behind != [ids["eos"]]):
    said = [" ".join(map(tokenizer.token_text, found)) or "nothing" for found in (before, behind)]
    raise DataError(f"the tokenizer puts {said[0]} before a text and {said[1]} behind it, llama.cpp only BOS and EOS")
  flags = {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(behind)}
  return flags | ({"tokenizer.ggml.bos_token_id": before[0]} if before else {})


def _between(definition: Mapping[str, Any]) -> dict[str, Any]:
  """Two tokens between a pair of texts, as RoBERTa has them, of which llama.cpp calls the second a separator."""
  post = definition.get("post_processor") or {}
  pair = post.get("pair") or []
  at = [i for i, part in enumerate(pair) if "Sequence" in part]
  separator = post["sep"][1] if post.get("type") == "RobertaProcessing" else None
  if len(at) == 2 and at[1] - at[0] == 3:
    separator = post["special_tokens"][pair[at[1] - 1]["SpecialToken"]["id"]]["ids"][0]
  if separator is None:
    return {}
  return {"tokenizer.ggml.add_sep_token": True, "tokenizer.ggml.seperator_token_id": separator}


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
  """The chat templates: the usual one, and others by name."""
  entries: dict[str, Any] = {}
  for name, text in tokenizer.chat_templates.items():
    entries["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = text
  if others := [name for name in tokenizer.chat_templates if name != "default"]:
    entries["tokenizer.chat_templates"] = others
  return entries


def _entries(
  kind: str,
  tokens: dict[int, str],
  types: dict[int, int],
  vocab_size: int,
  *,
  added: Collection[Mapping[str, Any]] = (),
  unknown: int | None = None,
  scores: Mapping[int, float] | None = None,
  unscored: float = -10000.0,
  **more: Any,
) -> dict[str, Any]:
  """The metadata of a vocabulary; ids without a token get a name that no text has.

  Args:
    kind: "tokenizer.ggml.model". tokens, types: by id. added: as in tokenizer.json; they go before both.
    unscored: of what `scores` lacks; by default as llama.cpp's converter has the filling.
    more: other keys.
  """
  tokens = tokens | {token["id"]: token["content"] for token in added}
  types = types | {token["id"]: CONTROL if token.get("special") else USER_DEFINED for token in added}
  types |= {} if unknown is None else {unknown: UNKNOWN}
  if max(tokens, default=0) >= vocab_size:
    raise DataError(f"the tokenizer has {max(tokens) + 1} tokens but the model only {vocab_size}")
  named = [tokens.get(i, f"[PAD{i}]") for i in range(vocab_size)]
  said: dict[str, Any] = {"model": kind, "pre": "default", "tokens": named}
  said["token_type"] = np.array([types.get(i, UNUSED) for i in range(vocab_size)], np.int32)
  if scores is not None:
    said["scores"] = np.array([scores.get(i, unscored) for i in range(vocab_size)], np.float32)
  return {f"tokenizer.ggml.{key}": value for key, value in (said | more).items()}


def _charsmap(table: bytes) -> dict[str, Any]:
  return {"precompiled_charsmap": np.frombuffer(table, np.uint8)} if table else {}


def _wordpiece_metadata(tokenizer: Tokenizer, definition: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  """BERT's, whose texts begin with [CLS] and end with [SEP]: llama.cpp always puts both."""
  tokens, types, said = write_wordpiece(definition)
  if said[STRIP]:
    _warn("llama.cpp takes away vowel signs too (in Hindi or Korean, say), where BERT takes away accents")
  entries = _entries("bert", tokens, types, vocab_size, pre="bert-bge") | said
  inner, whole = (tokenizer.encode_prompt("a", add_special=special).tolist() for special in (False, True))
  if whole[1:-1] != inner:
    raise DataError("the tokenizer does not put one token before a text and one behind it, as llama.cpp does for BERT")
  ids = {"bos": whole[0], "cls": whole[0], "seperator": whole[-1]}
  ids |= {name: i for name, i in (("padding", tokenizer.pad_id), ("unknown", tokenizer.unk_id)) if i is not None}
  mask = tokenizer.special_tokens.get("mask_token", "[MASK]")
  if mask in definition["model"]["vocab"]:
    ids["mask"] = definition["model"]["vocab"][mask]
  return entries | {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}


def _unigram_metadata(definition: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  """SentencePiece unigram as tokenizer.json has it (XLM-RoBERTa, T5)."""
  model = definition["model"]
  charsmap, spaces = b"", False
  for step in _steps(definition.get("normalizer"), "normalizers"):
    if step["type"] == "Precompiled":
      charsmap = base64.b64decode(step["precompiled_charsmap"])
    elif step["type"] == "Replace" and step["pattern"] == {"Regex": " {2,}"}:
      spaces = True
    elif step["type"] != "Strip":
      raise DataError(f"the tokenizer does to text what llama.cpp cannot: {json.dumps(step, ensure_ascii=False)[:80]}")
  cuts = _steps(definition.get("pre_tokenizer"), "pretokenizers")
  if [step["type"] for step in cuts] not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
    raise DataError("the unigram tokenizer cuts text in another way than at spaces, which llama.cpp cannot")
  tokens = {i: piece for i, (piece, _) in enumerate(model["vocab"])}
  types = dict.fromkeys(tokens, NORMAL)
  if model.get("byte_fallback"):
    types |= {i: BYTE for i, piece in tokens.items() if _BYTE_PIECE.fullmatch(piece)}
  return _entries(
    *("t5", tokens, types, vocab_size),
    added=definition.get("added_tokens") or (),
    unknown=model.get("unk_id"),
    scores={i: score for i, (_, score) in enumerate(model["vocab"])},
    add_space_prefix=cuts[-1].get("prepend_scheme", "always") != "never",
    remove_extra_whitespaces=spaces or len(cuts) > 1,
    **_charsmap(charsmap),
  )


def _steps(node: Any, key: str) -> list[dict[str, Any]]:
  """The parts of a normalizer or pre-tokenizer."""
  if not node:
    return []
  return node[key] if node["type"] == "Sequence" else [node]


def _bpe_metadata(definition: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  model = definition["model"]
  if model.get("type", "BPE") != "BPE" or "ByteLevel" not in json.dumps(definition.get("pre_tokenizer")):
    raise DataError("only byte-level BPE tokenizer.json files can be written as GGUF, and SentencePiece models")
  normalizer = _steps(definition.get("normalizer"), "normalizers")
  if normalizer == [{"type": "NFC"}]:
    _warn("the tokenizer composes characters (NFC), and llama.cpp takes them as they come")
  elif normalizer:
    raise DataError("the tokenizer normalizes text, which llama.cpp cannot do for byte-level BPE")
  patterns = _patterns(definition["pre_tokenizer"])
  found = [name for name, cuts in names.PRE_TOKENIZERS.items() if cuts == patterns]
  if not found:
    raise DataError(f"the tokenizer cuts text in a way that llama.cpp has no name for: {patterns}")
  if found[0] in ("tekken", "gpt-4o"):
    _warn("llama.cpp cuts words of this kind of tokenizer at their marks (in Hindi or Thai, say)")
  tokens = {i: token for token, i in model["vocab"].items()}
  return _entries(
    *("gpt2", tokens, dict.fromkeys(tokens, NORMAL), vocab_size),
    added=definition.get("added_tokens") or (),
    pre=found[0],
    merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
  )


def _fallback_metadata(definition: dict[str, Any], vocab_size: int) -> dict[str, Any]:
  """BPE over characters with byte pieces, as SentencePiece has it (Llama 2, Gemma): merges become scores."""
  model, normalizer, cutter = (definition.get(part) for part in ("model", "normalizer", "pre_tokenizer"))
  if model.get("type", "BPE") != "BPE":
    raise DataError("only byte-level BPE tokenizer.json files can be written as GGUF, and SentencePiece models")
  prefix = _prefix(normalizer, cutter)
  tokens = {i: token for token, i in model["vocab"].items()}
  types = {i: BYTE if _BYTE_PIECE.fullmatch(token) else NORMAL for i, token in tokens.items()}
  scores = {model["vocab"][piece]: -float(rank) for rank, piece in enumerate(_in_order(definition))}
  return _entries(
    *("llama", tokens, types, vocab_size),
    added=definition.get("added_tokens") or (),
    unknown=None if model.get("unk_token") is None else model["vocab"][model["unk_token"]],
    scores=scores,
    unscored=-1e9,  # of what no merge makes
    add_space_prefix=prefix,
    remove_extra_whitespaces=False,
  )


def _prefix(normalizer: Any, cutter: Any) -> bool:
  """Whether a space is put before a text; spaces must become U+2581, and nothing else may happen to a text."""
  steps = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else [normalizer] * bool(normalizer)
  prefix = {"type": "Prepend", "prepend": SPACE} in steps
  rest = [step for step in steps if step not in ({"type": "Prepend", "prepend": SPACE}, _REPLACE)]
  if cutter and cutter["type"] == "Metaspace" and cutter.get("replacement") == SPACE and not cutter.get("split"):
    prefix = cutter.get("prepend_scheme", "always") != "never"
    if prefix:
      _warn("llama.cpp puts a space before a text that begins with one too, and before one behind a special token")
  elif cutter is not None and (cutter.get("pattern"), cutter.get("behavior")) != _NOTHING:
    rest.append(cutter)
  elif _REPLACE not in steps:
    raise DataError("the tokenizer does not write spaces as U+2581, as llama.cpp does without byte-level BPE")
  if rest:
    raise DataError(f"the tokenizer does to text what llama.cpp cannot: {json.dumps(rest[0], ensure_ascii=False)[:80]}")
  return prefix


def _in_order(definition: dict[str, Any]) -> list[str]:
  """The pieces that merges make, first those of the first merges.

  Raises:
    DataError: the merges are not those of an order of pieces, by which llama.cpp goes.
  """
  vocab = definition["model"]["vocab"]
  added = {token["content"] for token in definition.get("added_tokens") or ()}
  made: dict[str, int] = {}  # piece -> how many merges make it
  last = None
  for merge in definition["model"]["merges"]:
    piece = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
    if piece not in added and piece in made and piece != last:
      raise DataError(f"the tokenizer's merges make {piece!r} at different ranks, and llama.cpp has one score a piece")
    made[piece], last = made.get(piece, 0) + 1, piece
  for piece in vocab:
    if len(piece) > 1 and piece not in added and not _BYTE_PIECE.fullmatch(piece):
      ways = sum(piece[:cut] in vocab and piece[cut:] in vocab for cut in range(1, len(piece)))
      if ways != made.get(piece, 0):
        raise DataError(f"the tokenizer has no merge for some parts of {piece!r}, which llama.cpp would join")
  return list(made)


def _patterns(node: dict[str, Any]) -> tuple[str, ...]:
  """The patterns by which a pre-tokenizer cuts, in the spelling of PRE_TOKENIZERS."""
  kind = node["type"]
  if kind == "Sequence":
    return sum(map(_patterns, node["pretokenizers"]), ())
  if kind == "ByteLevel" and not node.get("add_prefix_space", True):
    return (names.GPT2,) if node.get("use_regex", True) else ()
  if kind == "Digits" and node.get("individual_digits"):
    return (r"\p{N}",)
  if kind == "Split" and node["behavior"] == "Isolated" and not node.get("invert"):
    return (node["pattern"].get("Regex", ""),)
  raise DataError(f"the tokenizer's pre-tokenizer {json.dumps(node)[:80]} has no equal in llama.cpp")


def _sentencepiece_metadata(model: bytes, added: Mapping[str, dict], vocab_size: int) -> dict[str, Any]:
  """`added`: tokens beyond the model's pieces, or in place of one, as in tokenizer_config.json."""
  from sentencepiece import sentencepiece_model_pb2 as model_pb2

  proto = model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
  spec, normalizer = proto.trainer_spec, proto.normalizer_spec
  if spec.model_type not in (names.UNIGRAM, names.BPE) or spec.treat_whitespace_as_suffix:
    raise DataError("only SentencePiece models of the kinds bpe and unigram can be written as GGUF")
  unigram = spec.model_type == names.UNIGRAM
  if not unigram and (normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces):
    raise DataError("the SentencePiece model normalizes text, which llama.cpp cannot do for the kind bpe")
  tokens, types = {}, {}
  for i, piece in enumerate(proto.pieces):
    text = piece.piece.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.piece
    tokens[i], types[i] = text, piece.type
  return _entries(
    *("t5" if unigram else "llama", tokens, types, vocab_size),
    added=[{**token, "id": int(key)} for key, token in added.items()],
    scores={i: piece.score for i, piece in enumerate(proto.pieces)},
    add_space_prefix=normalizer.add_dummy_prefix,
    remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
    **_charsmap(normalizer.precompiled_charsmap),
  )

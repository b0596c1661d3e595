"""A tokenizer in GGUF metadata as the files that `load_tokenizer` reads.

llama.cpp knows four kinds that matter here (src/llama-vocab.cpp):
- "gpt2": byte-level BPE by merges. How text is cut before merging is not in the file but a name,
  `tokenizer.ggml.pre`; PRE_TOKENIZERS says what the names stand for.
- "llama": SentencePiece BPE by scores, with byte pieces. Unlike SentencePiece, llama.cpp does not tell a
  literal U+2581 from a space, nor the spelling of a control token from what merging makes of it.
- "t5": SentencePiece unigram, without byte pieces: in llama.cpp, characters that are no piece become <unk>.
- "bert": WordPiece; see `jaxllm.interop.gguf.wordpiece`.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.data.tokenizers.base import settings_file
from jaxllm.interop.gguf.header import entry
from jaxllm.interop.gguf.wordpiece import CONTROL, KEYS, NORMAL, added_token, read_wordpiece, template

Files = dict[str, bytes]  # by name
UNKNOWN, USER_DEFINED, UNUSED, BYTE = 2, 4, 5, 6  # also SentencePiece's numbers
UNIGRAM, BPE = 1, 2  # SentencePiece's model types
SPACE = "\u2581"  # in SentencePiece's pieces
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# Tokens that end a turn; llama.cpp stops at them whatever the metadata say.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
  r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
  r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MARKED = (
  r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
  "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# What cuts the text, one pattern after the other, as the models' own tokenizer.json files spell it.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
  "gpt-2": (GPT2,),
  "smollm": (r"\p{N}", GPT2),
  "llama-bpe": (_WORDS % "{1,3}",),
  "qwen2": (_WORDS % "",),
  "tekken": (_CASED % ("", "", ""),),
  "deepseek-v3": (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _MARKED),
  "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}"),
  "bloom": (r" ?[^(\s|[.,!?…。，、।۔،])]+",),
  "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
  "gpt-4o": (_CASED % (_SUFFIX, _SUFFIX, "{1,3}"),),
  "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_SAME = {
  "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "mellum", "modern-bert"),
  "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
  "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
  "qwen2": ("stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"),
}
_SAME |= {"bloom": ("poro-chat", "gpt3-finnish")}
_ALIASES = {alias: name for name, aliases in _SAME.items() for alias in aliases}
# A piece that is a whole word is taken before any merge; and a text begins with BOS unless the file says otherwise.
_IGNORE_MERGES = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "tekken", "glm4"}
_ADD_BOS = _IGNORE_MERGES - {"glm4"}

# What llama.cpp takes where a file does not say.
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}}
_DEFAULT_IDS["bert"] = {"bos": 101, "unk": 100, "seperator": 102, "pad": 0, "mask": 103}


def special_ids(entries: Mapping[str, Any]) -> dict[str, Any]:
  """bos_token_id, eos_token_id (a list: every token that ends a text or a turn), pad_token_id, unk_token_id,
  add_bos_token and add_eos_token.

  Raises:
    CheckpointError: an id outside the vocabulary.
  """
  tokens, kind = entry(entries, "tokenizer.ggml.tokens", list, []), entry(entries, "tokenizer.ggml.model", str)
  ids: dict[str, Any] = {}
  own = {"eot": "eot", "eom": "eom"} | {name: name for name in KEYS.values() if kind == "bert"}
  for role, name in (ROLES | own).items():
    token = entry(entries, f"tokenizer.ggml.{name}_token_id", int)
    if token is None:
      token = _DEFAULT_IDS.get(str(kind), {}).get(role)
    if token is not None:
      if not 0 <= token < max(len(tokens), 1):
        raise CheckpointError(f"the GGUF metadata tokenizer.ggml.{name}_token_id is {token}, not a token's id")
      ids[f"{role}_token_id"] = token
  types = entry(entries, "tokenizer.ggml.token_type", np.ndarray, ())
  ends = [ids.pop(key) for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in ids]
  ends += [i for i, (text, t) in enumerate(zip(tokens, types)) if t == CONTROL and text in TURN_ENDS]
  if ends:
    ids["eos_token_id"] = list(dict.fromkeys(ends))
  adds_bos = kind in ("llama", "bert") or (kind == "gpt2" and entry(entries, "tokenizer.ggml.pre", str) in _ADD_BOS)
  ids["add_bos_token"] = entry(entries, "tokenizer.ggml.add_bos_token", bool, adds_bos)
  ids["add_eos_token"] = entry(entries, "tokenizer.ggml.add_eos_token", bool, kind == "t5")
  return ids


def _first(ids: Mapping[str, Any], role: str) -> int | None:
  """A role's token, the first where there are several."""
  found = ids.get(f"{role}_token_id")
  return found[0] if isinstance(found, list) else found


def tokenizer_files(entries: Mapping[str, Any]) -> Files | None:
  """The tokenizer of a GGUF file's metadata; None if it has none.

  Raises:
    CheckpointError: an unknown kind of tokenizer, or metadata that make none.
  """
  kind = entry(entries, "tokenizer.ggml.model", str)
  if kind in (None, "none", "no_vocab"):
    return None
  if kind not in ("gpt2", "llama", "t5", "bert"):
    known = "gpt2, llama, t5 and bert"
    raise CheckpointError(f"the GGUF file has a tokenizer of the kind {kind!r}; those known are {known}")
  tokens = entry(entries, "tokenizer.ggml.tokens", list)
  if not tokens or len(set(tokens)) != len(tokens):
    raise CheckpointError("the GGUF file's tokenizer.ggml.tokens is missing, or names a token twice")
  types = entry(entries, "tokenizer.ggml.token_type", np.ndarray, np.full(len(tokens), NORMAL))
  if len(types) != len(tokens):
    raise CheckpointError("the GGUF file's tokenizer.ggml.token_type does not fit its tokens")
  # Rows that only fill up the embedding are no tokens.
  while tokens and types[len(tokens) - 1] == UNUSED and tokens[-1] == f"[PAD{len(tokens) - 1}]":
    tokens = tokens[:-1]
  ids = special_ids(entries)
  special = {role: _first(ids, role) for role in ROLES}
  settings = {f"{role}_token": None if i is None else tokens[i] for role, i in special.items()}
  if kind == "bert":
    named = {role: ids.get(f"{name}_token_id") for role, name in KEYS.items()}
    settings = {role: token for role, token in settings.items() if token is not None}  # [SEP] ends texts all the same
    settings |= {role: tokens[i] for role, i in named.items() if i is not None}
  else:
    settings |= {key: ids[key] for key in ("add_bos_token", "add_eos_token")}
  templates = {"default": entry(entries, "tokenizer.chat_template", str)}
  for name in entry(entries, "tokenizer.chat_templates", list, []):
    templates[str(name)] = entry(entries, f"tokenizer.chat_template.{name}", str)
  if found := [{"name": name, "template": text} for name, text in templates.items() if text]:
    settings["chat_template"] = found[0]["template"] if found == found[:1] and templates["default"] else found
  files = settings_file(settings)
  if kind == "bert":
    return files | {"tokenizer.json": read_wordpiece(entries, tokens, types, ids)}
  if kind == "gpt2":
    return files | {"tokenizer.json": _bpe_file(entries, tokens, types, ids)}
  return files | {"tokenizer.model": _sentencepiece_file(entries, tokens, types, ids)}


def _bpe_file(entries: Mapping[str, Any], tokens: list[str], types: np.ndarray, ids: Mapping[str, Any]) -> bytes:
  pre = entry(entries, "tokenizer.ggml.pre", str, "default")
  patterns = PRE_TOKENIZERS.get(_ALIASES.get(pre, pre))
  if patterns is None:
    known = ", ".join(sorted([*PRE_TOKENIZERS, *_ALIASES]))
    raise CheckpointError(f"the GGUF file's tokenizer cuts text as {pre!r}; ways known here are {known}")
  merges = entry(entries, "tokenizer.ggml.merges", list)
  if merges is None:
    raise CheckpointError("the GGUF file lacks tokenizer.ggml.merges, which its tokenizer needs")
  # Split at the first space behind the first character, as llama.cpp does.
  pairs = [[merge[:cut], merge[cut + 1 :]] for merge in merges if (cut := merge.find(" ", 1)) > 0]
  kept = np.flatnonzero(np.isin(types[: len(tokens)], (CONTROL, USER_DEFINED, UNKNOWN))).tolist()
  bos, eos = (_first(ids, role) if ids[f"add_{role}_token"] else None for role in ("bos", "eos"))
  split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
  level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
  definition = {
    "version": "1.0",
    "added_tokens": [added_token(i, tokens[i], bool(types[i] != USER_DEFINED)) for i in kept],
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, level]},
    "post_processor": template(tokens, bos, eos, again=True),
    "decoder": level,
    "model": {
      "type": "BPE",
      "ignore_merges": pre in _IGNORE_MERGES,
      "vocab": {token: i for i, token in enumerate(tokens)},
      "merges": pairs,
    },
  }
  return json.dumps(definition, ensure_ascii=False).encode()


def _sentencepiece_file(entries, tokens: list[str], types: np.ndarray, ids: Mapping[str, Any]) -> bytes:
  from sentencepiece import sentencepiece_model_pb2 as model_pb2

  scores = entry(entries, "tokenizer.ggml.scores", np.ndarray, ())
  if len(scores) < len(tokens):
    raise CheckpointError("the GGUF file's tokenizer.ggml.scores is missing or does not fit its tokens")
  proto = model_pb2.ModelProto()  # type: ignore[attr-defined]
  unknown = ids.get("unk_token_id", 0)
  for i, (text, score) in enumerate(zip(tokens, scores.tolist())):
    # SentencePiece must have one unknown piece; some files call it a control token.
    kind = UNKNOWN if i == unknown else CONTROL if types[i] == UNKNOWN else int(types[i])
    if kind == USER_DEFINED:  # llama.cpp looks for these in the text, SentencePiece where spaces are replaced
      text = text.replace(" ", SPACE)
    proto.pieces.add(piece=text, score=score, type=kind if kind in range(1, 7) else NORMAL)
  unigram = entries["tokenizer.ggml.model"] == "t5"
  spec, normalizer = proto.trainer_spec, proto.normalizer_spec
  spec.model_type = UNIGRAM if unigram else BPE
  spec.vocab_size = len(tokens)
  spec.byte_fallback = bool((types == BYTE).any())
  for role in ROLES:
    at = _first(ids, role)
    setattr(spec, f"{role}_id", -1 if at is None else at)
    if at is not None:
      setattr(spec, f"{role}_piece", tokens[at])
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = entry(entries, "tokenizer.ggml.add_space_prefix", bool, True)
  normalizer.remove_extra_whitespaces = entry(entries, "tokenizer.ggml.remove_extra_whitespaces", bool, False)
  charsmap = entry(entries, "tokenizer.ggml.precompiled_charsmap", np.ndarray)
  if charsmap is not None:
    normalizer.precompiled_charsmap = charsmap.tobytes()
  return proto.SerializeToString()

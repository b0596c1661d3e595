"""What a tokenizer's class decides: how text is cut, and which tokens stand around it.

Model files name a class, and `AutoTokenizer` of `transformers` 5, which is followed here, gives it the last word, also
against a tokenizer.json: only the vocabulary, the merges and the added tokens are the file's. A class that is not in
`CLASSES` (PreTrainedTokenizerFast above all) takes the tokenizer.json as it is.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxllm.base.errors import DataError, shown
from jaxllm.data.tokenizers.base import token_text

Json = dict[str, Any]
SPACE = "\u2581"  # which SentencePiece writes for a space
AS_IT_IS = "PreTrainedTokenizerFast"
_NO_CLASS = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")  # names of the same
_ENDS = "bos", "eos"
_QWEN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDOFTEXT = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>"}
_ROBERTA |= {"pad_token": "<pad>", "mask_token": "<mask>"}
_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_GEMMA = {f"{role}_token": f"<{role}>" for role in ("unk", "bos", "eos", "pad", "mask")}
_COHERE = {"unk_token": "<UNK>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>"}
_COHERE |= {"cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"}
_LLAMA = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_LEFT = {"padding_side": "left"}
_T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclasses.dataclass(frozen=True)
class Class:
  """One class, or several that differ in name only.

  Attributes:
    defaults: settings where the files are silent; of tokens those that the vocabulary has.
    parts: from the settings and the file's own parts to `normalizer`, `pre_tokenizer` and `decoder`.
    around: what stands around one text and two, of roles ("cls_token"), `$A` and `$B`; None: the file decides.
    model: the type and the switches of the vocabulary, where there is no tokenizer.json.
  """

  defaults: Mapping[str, Any]
  parts: Callable[[Json, Json], Json]
  model: Json
  around: tuple[str, str] | None = None


def _part(rust: Any) -> Json | None:
  """A part of the `tokenizers` library as it stands in a tokenizer.json."""
  return None if rust is None else json.loads(rust.__getstate__())


def _parts(normalizer: Any, pre_tokenizer: Any, decoder: Any) -> Json:
  named = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder}
  return {name: rust if isinstance(rust, dict) else _part(rust) for name, rust in named.items()}


def _byte_level(settings: Json, own: Json, cutter: Any = None, use_regex: bool = True, nfc: bool = False) -> Json:
  """Characters that stand for bytes, as in GPT-2; `cutter`: what cuts a text before GPT-2's regular expression does,
  or, without `use_regex`, in its place."""
  from tokenizers import decoders, normalizers, pre_tokenizers

  level = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")), use_regex=use_regex)
  cut = level if cutter is None else pre_tokenizers.Sequence([cutter, level])
  return _parts(normalizers.NFC() if nfc else None, cut, decoders.ByteLevel())


def _neox(settings: Json, own: Json) -> Json:
  # Its class puts nothing around texts, whatever the file says.
  return _byte_level(settings, own, nfc=True) | {"post_processor": None}


def _cohere(settings: Json, own: Json) -> Json:
  from tokenizers import pre_tokenizers

  return _byte_level(settings, own, pre_tokenizers.Digits(individual_digits=True), nfc=True)


def _qwen(settings: Json, own: Json) -> Json:
  from tokenizers import Regex, pre_tokenizers

  return _byte_level(settings, own, pre_tokenizers.Split(Regex(_QWEN), behavior="isolated"), use_regex=False, nfc=True)


def _wordpiece(settings: Json, own: Json) -> Json:
  from tokenizers import decoders, normalizers, pre_tokenizers

  normalizer = normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    strip_accents=settings.get("strip_accents"),
    lowercase=settings.get("do_lower_case", True),
  )
  return _parts(normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##"))


def _llama(settings: Json, own: Json) -> Json:
  from tokenizers import decoders, pre_tokenizers

  prefix = settings.get("add_prefix_space") is not False
  scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
  steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  steps += [decoders.Strip(content=" ", left=1)] * prefix
  cutter = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
  return _parts(None, cutter, decoders.Sequence(steps))


def _gemma(settings: Json, own: Json) -> Json:
  from tokenizers import decoders, normalizers, pre_tokenizers

  decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
  cutter = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
  return _parts(normalizers.Replace(" ", SPACE), cutter, decoder)


def _words(settings: Json, own: Json) -> Json:
  """T5, XLM-R, mBART: SentencePiece's table of characters, then words with U+2581 before them."""
  from tokenizers import decoders
  from tokenizers import pre_tokenizers as cut

  scheme = "never" if settings.get("add_prefix_space") is False else "always"
  metaspace = cut.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)
  decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=True)
  return _parts(_table(own.get("normalizer")), cut.Sequence([cut.WhitespaceSplit(), metaspace]), decoder)


def _nllb(settings: Json, own: Json, always: bool = False) -> Json:
  """SentencePiece's table of characters, then U+2581 for spaces; `always`: many become one without a table too."""
  from tokenizers import Regex, decoders, normalizers, pre_tokenizers

  table = _table(own.get("normalizer"))
  steps = [*[table] * (table is not None), _part(normalizers.Replace(Regex(" {2,}"), " "))]
  metaspace = {"replacement": SPACE, "prepend_scheme": "always", "split": True}
  normalizer = {"type": "Sequence", "normalizers": steps} if table or always else None
  return _parts(normalizer, pre_tokenizers.Metaspace(**metaspace), decoders.Metaspace(**metaspace))


def _table(normalizer: Json | None) -> Json | None:
  """The table of characters that a SentencePiece model came with, among the steps of a normalizer."""
  steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
  return next((step for step in steps if step.get("type") == "Precompiled"), None)


def _deberta(settings: Json, own: Json) -> Json:
  from tokenizers import Regex, decoders, normalizers
  from tokenizers import pre_tokenizers as cut

  lower = [normalizers.Lowercase()] if settings.get("do_lower_case", False) else []
  tidy = [normalizers.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), normalizers.NFC(), normalizers.Strip(False, True)]
  scheme = "first" if settings.get("add_prefix_space") is False else "always"
  punctuation = [cut.Punctuation(behavior="isolated")] if settings.get("split_by_punct", False) else []
  cutter = cut.Sequence([*punctuation, cut.Metaspace(replacement=SPACE, prepend_scheme=scheme)])
  decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
  return _parts(normalizers.Sequence([*lower, *tidy]), cutter, decoder)


_BPE = {"type": "BPE", "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False}
_FALLBACK = {"type": "BPE", "fuse_unk": True, "byte_fallback": True}
_NLLB = {"type": "BPE", "fuse_unk": True, "byte_fallback": False}
_UNIGRAM = {"type": "Unigram", "byte_fallback": False}
_CLS_SEP = ("cls_token $A sep_token", "cls_token $A sep_token $B:1 sep_token:1")
_SEP_SEP = ("cls_token $A sep_token", "cls_token $A sep_token sep_token $B sep_token")
_EOS_LAST = ("$A eos_token", "$A eos_token $B eos_token")
_LANGUAGE_LAST = ("$A eos_token src_lang", "$A $B eos_token src_lang")
_LANGUAGE_FIRST = ("src_lang $A eos_token", "src_lang $A $B eos_token")
_MBART = _ROBERTA | {"src_lang": "en_XX"}

_GPT2 = Class(_ENDOFTEXT, _byte_level, _BPE)
_XLM_R = Class(_ROBERTA, _words, _UNIGRAM, ("bos_token $A eos_token", "bos_token $A eos_token eos_token $B eos_token"))
_BERTS = Class(_BERT, _wordpiece, {"type": "WordPiece"}, _CLS_SEP)
_ROBERTAS = Class(_ROBERTA, _byte_level, _BPE, _SEP_SEP)
_MBARTS = Class(_MBART, lambda settings, own: _words({}, {}), _UNIGRAM, _LANGUAGE_LAST)
_T5S = Class(_T5, lambda settings, own: _words({}, own), _UNIGRAM, _EOS_LAST)
CLASSES: dict[str, Class] = {
  "GPT2Tokenizer": _GPT2,
  "CodeGenTokenizer": _GPT2,
  "GPTNeoXTokenizer": Class(_ENDOFTEXT | {"pad_token": "<|padding|>"}, _neox, _BPE),
  "Qwen2Tokenizer": Class(dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"), _qwen, _BPE),
  "CohereTokenizer": Class(_COHERE | _LEFT, _cohere, _BPE),
  "RobertaTokenizer": _ROBERTAS,
  "BartTokenizer": _ROBERTAS,
  "BertTokenizer": _BERTS,
  "DistilBertTokenizer": _BERTS,
  "ElectraTokenizer": _BERTS,
  "MPNetTokenizer": Class(_ROBERTA | {"unk_token": "[UNK]"}, _wordpiece, {"type": "WordPiece"}, _SEP_SEP),
  "LlamaTokenizer": Class(_LLAMA | _LEFT | {"legacy": False}, _llama, _FALLBACK),
  "GemmaTokenizer": Class(_GEMMA | _LEFT, _gemma, _FALLBACK),
  "T5Tokenizer": _T5S,
  "XLMRobertaTokenizer": _XLM_R,
  "CamembertTokenizer": _XLM_R,
  "DebertaV2Tokenizer": Class(_BERT | {"bos_token": "[CLS]", "eos_token": "[SEP]"}, _deberta, _UNIGRAM, _CLS_SEP),
  "MBartTokenizer": _MBARTS,
  "MBart50Tokenizer": Class(_MBART, lambda settings, own: _nllb(settings, own, always=True), _UNIGRAM, _LANGUAGE_FIRST),
  "NllbTokenizer": Class(_ROBERTA | {"src_lang": "eng_Latn"}, _nllb, _NLLB, _LANGUAGE_FIRST),
}
# AutoTokenizer's class of kinds of models; None: the tokenizer.json as it is, whatever is declared.
_MODELS: dict[str | None, str] = {
  "RobertaTokenizer": "bart roberta data2vec-text",
  "CamembertTokenizer": "camembert",
  "BertTokenizer": "bert distilbert electra",
  "MPNetTokenizer": "mpnet",
  "DebertaV2Tokenizer": "deberta-v2",
  "XLMRobertaTokenizer": "xlm-roberta",
  "MBartTokenizer": "mbart",
  "M2M100Tokenizer": "m2m_100",
  "T5Tokenizer": "t5 mt5",
  "GPT2Tokenizer": "gpt2 gpt_neo gptj opt phi starcoder2",
  "GPTNeoXTokenizer": "gpt_neox olmo olmoe",
  "CohereTokenizer": "cohere cohere2",
  "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text",
  "Qwen2Tokenizer": "qwen2 qwen2_moe qwen3 qwen3_moe",
  None: """
    mistral mixtral olmo2 olmo3 granite granitemoe glm glm4 glm4_moe modernbert phi3 phimoe stablelm umt5 gpt_bigcode
    nemotron xlm-roberta-xl
  """,
}
_OF_MODELS = {model: name for name, models in _MODELS.items() for model in models.split()}
_MISDECLARED = {"qwen2", "phi3", "phimoe", "modernbert", "nemotron"}  # whose published files name wrong classes


def class_of(settings: Mapping[str, Any], config: Mapping[str, Any], definition: str | None) -> str | None:
  """The class that AutoTokenizer would take; None where no file names one, nor a kind of model.

  Args:
    settings: tokenizer_config.json.
    config: the model's config.json, of which `model_type` and `tokenizer_class` are read.
    definition: tokenizer.json.
  """
  declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
  model = config.get("model_type")
  if not isinstance(declared, str | None) or not isinstance(model, str | None):
    return None
  if not declared:
    return (_OF_MODELS.get(model) or AS_IT_IS) if model else None
  name = declared.removesuffix("Fast")
  if name in _NO_CLASS:
    name = AS_IT_IS
  if name == "LlamaTokenizer" and model not in _MISDECLARED and '"ByteLevel"' in (definition or ""):
    return AS_IT_IS
  if model not in _OF_MODELS or _OF_MODELS[model] == name:
    return name
  return (_OF_MODELS[model] if model in _MISDECLARED else name) if _OF_MODELS[model] else AS_IT_IS


def as_class(name: str, definition: Json, settings: Json, whole: bool = True) -> tuple[Json, Json]:
  """A tokenizer.json, and its settings, as a class reads them.

  Args:
    name: of `class_of`.
    definition: what stands in tokenizer.json.
    settings: tokenizer_config.json.
    whole: `definition` is a tokenizer.json that was found, and no vocabulary only.

  Raises:
    DataError: the vocabulary lacks a token that the class puts around texts.
  """
  kind = CLASSES.get(name)
  found = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
  own = definition.get("added_tokens") or []
  flagged = [token | found[token["id"]] if _same(found.get(token["id"]), token) else token for token in own]
  vocabulary = definition["model"]["vocab"]
  ids = dict(vocabulary) if isinstance(vocabulary, dict) else {piece: i for i, (piece, *_) in enumerate(vocabulary)}
  ids |= {token["content"]: token["id"] for token in own} | {token["content"]: i for i, token in found.items()}
  settings = settings | {"tokenizer_class": name}
  if kind is not None:
    silent = {key: value for key, value in kind.defaults.items() if key not in settings}
    settings = {key: v for key, v in silent.items() if v in ids or not key.endswith("_token")} | settings
    definition = definition | kind.parts(settings, definition)
  around = kind and kind.around
  if name == "NllbTokenizer" and settings.get("legacy_behaviour"):
    around = _LANGUAGE_LAST
  frame = definition.get("post_processor")
  if around is not None:
    frame = _frame(name, around, settings, ids)
  elif not (whole and frame):
    # Beside a tokenizer.json the two settings count for nothing.
    begin, end = (not whole and settings.get(f"add_{role}_token") and settings.get(f"{role}_token") for role in _ENDS)
    one = ["bos_token"] * bool(begin) + ["$A"] + ["eos_token"] * bool(end)
    two = [part.replace("$A", "$B") + ":1" for part in one]
    frame = _frame(name, (" ".join(one), " ".join(one + two)), settings, ids) if len(one) > 1 else None
  return definition | {"added_tokens": flagged, "post_processor": frame}, settings


def _same(token: Json | None, other: Json) -> bool:
  return token is not None and token["content"] == other["content"]


def _frame(name: str, around: tuple[str, str], settings: Json, ids: dict[str, int]) -> Json | None:
  """The part of a tokenizer.json that puts tokens around texts."""
  tokens: dict[str, str] = {}
  for role in dict.fromkeys(part.partition(":")[0] for text in around for part in text.split()):
    if not role.startswith("$"):
      token = token_text(settings.get(role, CLASSES[name].defaults.get(role) if name in CLASSES else None))
      if token is None or token not in ids:
        raise DataError(f"a {name} puts its {role} around texts, and the vocabulary has no {shown(token)}")
      tokens[role] = token
  if around is _SEP_SEP:
    from tokenizers import processors

    sep, cls = ((tokens[role], ids[tokens[role]]) for role in ("sep_token", "cls_token"))
    trim, space = settings.get("trim_offsets", True), bool(settings.get("add_prefix_space"))
    return _part(processors.RobertaProcessing(sep, cls, trim, space))

  def piece(part: str) -> Json:
    role, _, type_id = part.partition(":")
    one = {"id": tokens.get(role, role.removeprefix("$")), "type_id": int(type_id or 0)}
    return {"SpecialToken" if role in tokens else "Sequence": one}

  single, pair = ([piece(part) for part in text.split()] for text in around)
  special = {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in sorted(set(tokens.values()))}
  return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}

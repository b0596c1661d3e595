"""`SamplingParams`: how a completion is drawn and where it ends. Only values; nothing here computes."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jaxllm.base.errors import ConfigError

INFINITY = float("inf")


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
  """What the text of a completion must be; exactly one of the first five. vLLM's names.

  Raises:
    ConfigError: none or several are given, or one is of the wrong type.
  """

  json: str | Mapping[str, Any] | bool | None = None  # a JSON schema; the text is JSON that it admits
  json_object: bool = False  # any JSON object
  regex: str | None = None  # matches the whole text; the syntax of Rust's regex
  choice: Sequence[str] | None = None  # one of these
  grammar: str | None = None  # a context-free grammar in Lark's notation, or in GBNF's
  disable_any_whitespace: bool = False  # JSON on one line, without spaces

  def __post_init__(self):
    names = [name for name in ("json", "json_object", "regex", "choice", "grammar") if self._given(name)]
    if len(names) != 1:
      found = " and ".join(names) or "none of them"
      raise ConfigError(f"structured_outputs takes one of json, json_object, regex, choice and grammar, not {found}")
    if self.choice is not None:
      one_text = isinstance(self.choice, str)
      object.__setattr__(self, "choice", () if one_text else tuple(self.choice))
      if not self.choice or not all(isinstance(text, str) and text for text in self.choice):
        raise ConfigError("structured_outputs.choice must be a list of texts that are not empty")
    for name in ("regex", "grammar"):
      value = getattr(self, name)
      if value is not None and not (isinstance(value, str) and value):
        raise ConfigError(f"structured_outputs.{name} is {value!r}; it must be a text that is not empty")
    if self.json is not None and not isinstance(self.json, str | Mapping | bool):
      raise ConfigError("structured_outputs.json must be a JSON schema, as a dict or as text")

  def _given(self, name: str) -> bool:
    return getattr(self, name) not in (None, False) or (name == "json" and self.json is False)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How a completion is drawn and where it ends; vLLM's names, defaults and meanings, and where vLLM has
  none, transformers'.

  Raises:
    ConfigError: a value outside its range, or two that exclude each other.
  """

  n: int = 1  # completions per prompt
  best_of: int | None = None  # so many are drawn, and of them the n with the highest log-probability given back
  temperature: float = 1.0  # 0: always the most likely token
  top_k: int = 0  # only the k most likely tokens; 0 or -1: all
  top_p: float = 1.0  # only the most likely tokens that together have this probability
  min_p: float = 0.0  # only tokens at least this likely relative to the most likely one
  typical_p: float = 1.0  # only tokens whose surprise is nearest to the expected one, together this probable
  top_h: float | None = None  # only the most likely tokens that together have this share of the entropy; None: all
  epsilon_cutoff: float = 0.0  # only tokens at least this likely
  eta_cutoff: float = 0.0  # the same, but less where the entropy is high
  repetition_penalty: float = 1.0  # divides the positive logits of tokens seen so far, multiplies the negative ones
  presence_penalty: float = 0.0  # is subtracted from the logit of every token drawn so far
  frequency_penalty: float = 0.0  # is subtracted once for each time that it was drawn
  no_repeat_ngram_size: int = 0  # no run of so many tokens comes twice, the prompt's included
  # Of the prompt, which an encoder_decoder's encoder reads:
  encoder_repetition_penalty: float = 1.0  # multiplies its tokens' positive logits, divides their negative ones
  encoder_no_repeat_ngram_size: int = 0  # no run of so many of its tokens comes
  logit_bias: Mapping[int, float] | None = None  # is added to a token's logit
  sequence_bias: Mapping[Sequence[int], float] | None = None  # to that of a sequence's last token, behind the others
  bad_words: Sequence[str] = ()  # texts whose tokens are not drawn in a row
  bad_words_ids: Sequence[Sequence[int]] = ()  # the same as token ids
  allowed_token_ids: Sequence[int] | None = None  # only these
  suppress_tokens: Sequence[int] = ()  # never these
  begin_suppress_tokens: Sequence[int] = ()  # not these as the first token
  # The completion's first token, and its last one if it reaches max_tokens; of several any, all equally likely.
  forced_bos_token_id: int | Sequence[int] | None = None
  forced_eos_token_id: int | Sequence[int] | None = None
  # (start, factor): behind the completion's first `start` tokens the logits of what ends it grow by factor ** tokens.
  exponential_decay_length_penalty: tuple[int, float] | None = None
  min_tokens: int = 0  # nothing ends a completion before it has so many
  max_tokens: int | None = 16  # None: up to the model's max_seq_len
  min_length: int = 0  # like min_tokens and max_tokens, but the prompt's tokens count too
  max_length: int | None = None
  stop: str | Sequence[str] = ()  # the text ends before the first of these
  stop_token_ids: Sequence[int] = ()  # the completion ends at these tokens, besides the tokenizer's end
  include_stop_str_in_output: bool = False  # the text ends behind what stopped it
  skip_special_tokens: bool = True  # False: the text shows special tokens as the vocabulary spells them
  ignore_eos: bool = False
  seed: int | None = None  # None: a new one every time
  logprobs: int | None = None  # log-probabilities of the chosen token and of so many most likely ones
  prompt_logprobs: int | None = None  # the same of every token of the prompt
  structured_outputs: StructuredOutputsParams | None = None
  # Over 1: beam search (see `jaxllm.inference.beam`), which draws nothing; transformers' meanings.
  num_beams: int = 1
  length_penalty: float = 1.0  # a completion's log-probability is divided by its length to this power
  # True: stop at num_beams completions; False: when no better one is likely; "never": when none can come.
  early_stopping: bool | Literal["never"] = False
  renormalize_logits: bool = False  # beam search: what is left of the probabilities after the other settings sums to 1

  def __post_init__(self):
    for name, normal in _FORMS.items():
      value = getattr(self, name)
      with contextlib.suppress(TypeError, ValueError, AttributeError):  # no list, say: the check below tells it
        object.__setattr__(self, name, normal(value))
    for name, (good, wants) in _RANGES.items():
      if not _holds(good, getattr(self, name)):
        raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {wants}")
    self._check_together()

  def _check_together(self) -> None:
    def check(good, name, wants):
      if not good:
        raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {wants}")

    check(self.best_of is None or self.best_of >= self.n, "best_of", f"at least n ({self.n})")
    for low, high in (("min_tokens", "max_tokens"), ("min_length", "max_length")):
      limit = getattr(self, high)
      check(limit is None or getattr(self, low) <= limit, low, f"at most {high} ({limit})")
    if self.num_beams > 1:
      check(self.n <= self.num_beams, "n", f"at most num_beams ({self.num_beams}) in beam search")
      for name in ("stop", "logprobs", "best_of", "structured_outputs"):
        check(getattr(self, name) in ((), None), name, "left out in beam search, which ends at tokens only")
    if self.structured_outputs is not None:
      for name in ("forced_bos_token_id", "forced_eos_token_id"):
        check(getattr(self, name) is None, name, "left out beside structured_outputs, which may not admit it")

  @property
  def draws(self) -> int:
    """How many completions of a prompt are drawn, of which `n` are given back."""
    return self.n if self.best_of is None else self.best_of

  def named_tokens(self) -> dict[str, set[int]]:
    """The token ids that each setting names."""
    lists = (
      *("stop_token_ids", "suppress_tokens", "begin_suppress_tokens", "logit_bias", "allowed_token_ids"),
      *("forced_bos_token_id", "forced_eos_token_id"),
    )
    named = {name: set(_listed(getattr(self, name))) for name in lists}
    for name in ("bad_words_ids", "sequence_bias"):
      named[name] = {i for ids in getattr(self, name) or () for i in ids}
    return named


class Encodes(Protocol):
  """The part of `jaxllm.data.tokenizers.Tokenizer` that bad words need."""

  def encode(self, text: str) -> Sequence[int] | np.ndarray:
    """The token ids of a text, special ones left out."""


def with_word_ids(settings: SamplingParams, tokenizer: Encodes | None) -> SamplingParams:
  """`bad_words` as token ids: each word as it stands at the start of a text and as it does behind a space.

  Raises:
    ConfigError: there are bad words and no tokenizer.
  """
  if not settings.bad_words:
    return settings
  if tokenizer is None:
    raise ConfigError("bad_words need a tokenizer; use bad_words_ids")
  spelled = [form for word in settings.bad_words for form in (word, f" {word.lstrip()}")]
  ids = [tuple(int(i) for i in tokenizer.encode(form)) for form in spelled]
  known = dict.fromkeys([*settings.bad_words_ids, *(one for one in ids if one)])
  return dataclasses.replace(settings, bad_words=(), bad_words_ids=tuple(known))


def check_vocabulary(settings: SamplingParams, vocab_size: int) -> None:
  """That the model has every token which the settings name.

  Raises:
    ConfigError: it has not; the message names the setting.
  """
  for name, ids in settings.named_tokens().items():
    if ids and max(ids) >= vocab_size:
      raise ConfigError(f"{name} names token {max(ids)}, but the model's vocabulary has {vocab_size} tokens")


def _holds(good: Callable[[Any], bool], value: Any) -> bool:
  try:
    return bool(good(value))
  except (TypeError, AttributeError):  # of a type that cannot be compared
    return False


def _whole(value: Any, low: int) -> bool:
  return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= low)


def _number(value: Any, low: float, high: float) -> bool:
  numeric = isinstance(value, int | float | np.number) and not isinstance(value, bool)
  return numeric and bool(low <= value <= high) and not math.isinf(value)


def _ids(value: Any) -> bool:
  return all(_whole(i, 0) for i in value)


def _bias(value: Any) -> bool:
  return _number(value, -INFINITY, INFINITY) or value == -INFINITY


def _optional(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: value is None or good(value)


def _forced(value: Any) -> Any:
  several = None if value is None else _listed(value)
  return several[0] if several is not None and len(several) == 1 else several


def _listed(value: Any) -> tuple:
  return () if value is None else (value,) if isinstance(value, str | int) else tuple(value)


def _biases(value: Any) -> dict | None:
  """JSON has only strings as keys."""
  if value is None:
    return None
  return {int(key) if isinstance(key, str) and key.isdecimal() else key: bias for key, bias in dict(value).items()}


def _sequence_biases(value: Any) -> dict | None:
  """JSON has a list of pairs, token ids and bias."""
  pairs = value.items() if isinstance(value, Mapping) else value
  return None if value is None else {tuple(ids): bias for ids, bias in pairs}


def _decay(value: Any) -> tuple[int, float] | None:
  """JSON may have the number of tokens as 5.0."""
  if value is None:
    return None
  start, factor = value
  return int(start) if start == int(start) else start, factor


# One form for what may be spelled in several.
_FORMS: dict[str, Callable[[Any], Any]] = {
  "stop": _listed,
  "stop_token_ids": _listed,
  "suppress_tokens": _listed,
  "begin_suppress_tokens": _listed,
  "bad_words": _listed,
  "bad_words_ids": lambda value: tuple(map(tuple, value or ())),
  "allowed_token_ids": lambda value: None if value is None else _listed(value),
  "forced_bos_token_id": _forced,
  "forced_eos_token_id": _forced,
  "logit_bias": _biases,
  "sequence_bias": _sequence_biases,
  "structured_outputs": lambda value: StructuredOutputsParams(**value) if isinstance(value, Mapping) else value,
  "top_k": lambda value: 0 if value == -1 else value,
  "exponential_decay_length_penalty": _decay,
}
_IDS = (_ids, "token ids of at least 0")
_SOME_IDS = (_optional(lambda x: x and _ids(x)), "token ids of at least 0, at least one of them")
_FORCED = (lambda x: _SOME_IDS[0](None if x is None else _listed(x)), "a token id of at least 0, or several")
_COUNT = (_optional(lambda x: _whole(x, 0)), "a whole number of at least 0")
_AT_LEAST_ONE = (_optional(lambda x: _whole(x, 1)), "a whole number of at least 1")
_SHARE = (lambda x: _number(x, 0, 1) and x > 0, "over 0 and at most 1")
_BELOW_ONE = (lambda x: _number(x, 0, 1) and x < 1, "at least 0 and below 1")
_FACTOR = (lambda x: _number(x, 0, INFINITY) and x > 0, "a finite number over 0")
_PENALTY = (lambda x: _number(x, -2, 2), "between -2 and 2")
_SWITCH = (lambda x: isinstance(x, bool), "True or False")
_TEXTS = (lambda x: all(isinstance(s, str) and s for s in x), "strings that are not empty")
# What each setting may be, and how that is said. None is for those that may be left out.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
  "n": (lambda x: _whole(x, 1), "a whole number of at least 1"),
  "best_of": _AT_LEAST_ONE,
  "temperature": (lambda x: _number(x, 0, INFINITY), "a finite number of at least 0"),
  "top_k": (lambda x: _whole(x, 0), "a whole number of at least 1, or 0 for all tokens"),
  "top_p": _SHARE,
  "min_p": (lambda x: _number(x, 0, 1), "between 0 and 1"),
  "typical_p": _SHARE,
  "top_h": (_optional(_SHARE[0]), _SHARE[1]),
  "epsilon_cutoff": _BELOW_ONE,
  "eta_cutoff": _BELOW_ONE,
  "repetition_penalty": _FACTOR,
  "encoder_repetition_penalty": _FACTOR,
  "encoder_no_repeat_ngram_size": (lambda x: _whole(x, 0), "a whole number of at least 0"),
  "exponential_decay_length_penalty": (
    _optional(lambda x: len(x) == 2 and _whole(x[0], 0) and x[0] < 2**31 and _FACTOR[0](x[1])),
    "a number of tokens and a finite factor over 0",
  ),
  "renormalize_logits": _SWITCH,
  "presence_penalty": _PENALTY,
  "frequency_penalty": _PENALTY,
  "no_repeat_ngram_size": (lambda x: _whole(x, 0), "a whole number of at least 0"),
  "logit_bias": (
    _optional(lambda x: _ids(x) and all(map(_bias, x.values()))),
    "a number, or -inf, for each of some token ids",
  ),
  "sequence_bias": (
    _optional(lambda x: all(ids and _ids(ids) for ids in x) and all(map(_bias, x.values()))),
    "a number, or -inf, for each of some sequences of token ids",
  ),
  "bad_words": _TEXTS,
  "bad_words_ids": (
    lambda x: all(isinstance(ids, tuple) and ids and _ids(ids) for ids in x),
    "lists of token ids of at least 0, none of them empty",
  ),
  "allowed_token_ids": _SOME_IDS,
  "suppress_tokens": _IDS,
  "begin_suppress_tokens": _IDS,
  "forced_bos_token_id": _FORCED,
  "forced_eos_token_id": _FORCED,
  "min_tokens": (lambda x: _whole(x, 0), "a whole number of at least 0"),
  "max_tokens": _AT_LEAST_ONE,
  "min_length": (lambda x: _whole(x, 0), "a whole number of at least 0"),
  "max_length": _AT_LEAST_ONE,
  "stop": _TEXTS,
  "stop_token_ids": _IDS,
  "include_stop_str_in_output": _SWITCH,
  "skip_special_tokens": _SWITCH,
  "seed": (_optional(lambda x: _whole(x, 0) and x < 2**64), "between 0 and 2^64 - 1"),
  "logprobs": _COUNT,
  "prompt_logprobs": _COUNT,
  "structured_outputs": (
    _optional(lambda x: isinstance(x, StructuredOutputsParams)),
    "StructuredOutputsParams or a dict of its fields",
  ),
  "num_beams": (lambda x: _whole(x, 1), "a whole number of at least 1"),
  "length_penalty": (lambda x: _number(x, -INFINITY, INFINITY), "a finite number"),
  "early_stopping": (lambda x: x in (True, False, "never"), "True, False or 'never'"),
}

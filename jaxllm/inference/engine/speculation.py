"""Speculative decoding: who guesses a request's next tokens, and how many.

It never changes the text. The model draws at every guessed position with the request's own noise for that position,
and a guess is the request's token when it is what was drawn (`jaxllm.inference.engine.steps.step_function`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.dispatch import UNKNOWN
from jaxllm.inference.engine.lookup import Lookup
from jaxllm.inference.engine.pace import Pace, Trust
from jaxllm.inference.engine.request import Row
from jaxllm.inference.engine.sizes import Shape, Sizes
from jaxllm.models.build import Params
from jaxllm.models.config import Compute, ModelConfig


@dataclasses.dataclass(frozen=True)
class DraftModel:
  """A small model that guesses for a large one."""

  config: ModelConfig
  params: Params
  compute: Compute


@dataclasses.dataclass(frozen=True)
class Speculation:
  """Settings of speculative decoding.

  Raises:
    ConfigError: an impossible one.
  """

  method: str  # "ngram": what followed earlier in the text; "draft": what a small model would draw
  num_speculative_tokens: int = 7  # guesses of a step and request at most; eight tokens seldom cost more than one
  prompt_lookup_min: int = 2  # "ngram": tokens that must have occurred before
  prompt_lookup_max: int = 4  # and that are looked for first
  adaptive: bool = True  # fewer guesses where few hold, and none where that is measured to be faster
  draft: DraftModel | None = None

  def __post_init__(self):
    if self.method not in ("ngram", "draft"):
      raise ConfigError(f"speculative.method is {self.method!r}; it must be 'ngram' or 'draft'")
    for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"):
      value = getattr(self, name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"speculative.{name} is {value!r}; it must be a whole number of at least 1")
    if not isinstance(self.adaptive, bool):
      raise ConfigError(f"speculative.adaptive is {self.adaptive!r}; it must be True or False")
    if self.prompt_lookup_min > self.prompt_lookup_max:
      raise ConfigError(
        f"speculative.prompt_lookup_min is {self.prompt_lookup_min}; it must be at most prompt_lookup_max "
        f"({self.prompt_lookup_max})"
      )
    if (self.method == "draft") != (self.draft is not None):
      raise ConfigError("speculative: the method 'draft' needs a model, 'ngram' none")

  @classmethod
  def of(cls, settings: Mapping[str, Any], draft: DraftModel | None = None) -> "Speculation":
    """Of a dict of its fields, `model` left out, which `draft` is.

    Raises:
      ConfigError: there is no such setting, or its value is impossible.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.name != "draft"]
    if unknown := sorted(settings.keys() - set(known), key=str):
      raise ConfigError(f"speculative has no setting {unknown[0]!r}; there are {', '.join(known)} and model")
    if "method" not in settings:
      raise ConfigError("speculative needs a method: 'ngram' or 'draft'")
    return cls(**settings, draft=draft)


class Speculator:
  """Asks for guesses before each step, and learns from what became of them."""

  def __init__(self, speculation: Speculation, sizes: Sizes, timed: bool = True):
    """`timed`: guesses depend on how long steps take, which processes in lockstep would see differently."""
    self._how, self._sizes, self._pace, self._timed = speculation, sizes, Pace(), timed
    self._lookups: dict[int, Lookup] = {}
    self._trust: dict[int, Trust] = {}
    self.drafted = self.accepted = 0

  def propose(self, rows: Sequence[Row], steady: bool) -> None:
    """Sets `drafts` of rows for the next step: none unless it is `steady`, without a prompt to be read."""
    for row in rows:
      row.drafts = self._guess(row) if steady and row.left == 1 and row.draws else ()
    guessed = [row for row in rows if row.drafts]
    if guessed and self._how.adaptive and self._timed:
      plain, deep = self._sizes.shape_for([1] * len(rows)), max(len(row.drafts) for row in guessed)
      held = sum(self._trust[row.id].expected(len(row.drafts)) for row in guessed)
      drafted = self._sizes.shape_for([1 + len(row.drafts) for row in rows], deep)
      if not self._pace.worth(plain, drafted, len(rows), held):
        for row in guessed:
          row.drafts = ()

  def note(self, row: Row, drafted: int, held: int) -> None:
    """What became of a row's guesses."""
    if drafted:
      self.drafted, self.accepted = self.drafted + drafted, self.accepted + held
      self._trust[row.id].note(drafted, held)

  def took(self, shape: Shape, seconds: float) -> None:
    """How long a step of this shape was waited for."""
    self._pace.note(shape, seconds)

  def forget(self, row: Row) -> None:
    """The row is over."""
    self._lookups.pop(row.id, None)
    self._trust.pop(row.id, None)

  def _guess(self, row: Row) -> tuple[int, ...]:
    trust = self._trust.setdefault(row.id, Trust(self._how.num_speculative_tokens))
    most = trust.length if self._how.adaptive else self._how.num_speculative_tokens
    most = min(most, row.limit - row.total - 1)  # what is drawn after the last one must have room
    if most < 1:
      return ()
    if self._how.method == "draft":  # which cannot tell a grammar what it will guess
      return () if row.request.guide is not None else (UNKNOWN,) * most
    if row.id not in self._lookups:
      source = () if row.tokens[: row.begins] == list(row.request.prompt) else row.request.prompt
      self._lookups[row.id] = Lookup(self._how.prompt_lookup_min, self._how.prompt_lookup_max, source)
    return self._lookups[row.id].propose(row.tokens, most)

"""What values a number of the config may have, declared beside its type: `rate: Annotated[float, Range(0, below=1)]`.

`jaxllm.base.settings` checks it wherever a mapping becomes a dataclass. A number field without a range fails a test,
so "any number" is said too: `Range()`.
"""

import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from jaxllm.base.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Range:
  """From `low` to `high`, both included, or over `above` and below `below`; None: there is no bound on that side.

  never: values in between that are not meant either. words: what "it must", where the bounds do not say it well.
  """

  low: float | None = None
  high: float | None = None
  above: float | None = None
  below: float | None = None
  never: tuple[float, ...] = ()
  words: str = ""

  def holds(self, value: float) -> bool:
    """Whether the value is within."""
    return (
      (self.low is None or value >= self.low)
      and (self.high is None or value <= self.high)
      and (self.above is None or value > self.above)
      and (self.below is None or value < self.below)
      and value not in self.never
    )

  def wish(self, value: float) -> str:
    """What a value that is not within must be instead."""
    if self.words:
      return self.words
    if self.high == LARGEST and value > self.high:
      return f"be at most {LARGEST}"
    if self.low == 0 and self.high in (None, LARGEST) and self.below is None:
      return "not be negative"
    if self.low is not None and self.high is not None and self.high != LARGEST:
      return f"be from {self.low:g} to {self.high:g}"
    bounds = {"at least": self.low, "at most": self.high, "over": self.above, "below": self.below}
    told = [f"{word} {bound:g}" for word, bound in bounds.items() if bound not in (None, LARGEST)]
    return "be " + " and ".join(told)


LARGEST = 2**31 - 1  # that counters and shapes on devices hold
Count = Annotated[int, Range(0, LARGEST)]
Size = Annotated[int, Range(1, LARGEST)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Amount = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]  # of a moving average; a probability that leaves something


@functools.cache
def ranges(cls: type) -> dict[str, Range]:
  """Field name -> the range of its numbers, of a dataclass; what has none is left out."""
  hints = typing.get_type_hints(cls, include_extras=True)
  found = {field.name: _range(hints[field.name]) for field in dataclasses.fields(cls)}
  return {name: one for name, one in found.items() if one is not None}


def _range(kind: Any) -> Range | None:
  """The range anywhere in a type: of an optional number, or of a list's or a mapping's entries."""
  for one in getattr(kind, "__metadata__", ()):
    if isinstance(one, Range):
      return one
  return next(filter(None, map(_range, typing.get_args(kind))), None)


def check(cls: type, values: Mapping[str, Any], path: str = "") -> None:
  """That the values of a dataclass's fields are within their ranges.

  Raises:
    ConfigError: names the first that is not.
  """
  for name, one in ranges(cls).items():
    for key, value in _numbers(values.get(name), f"{path}.{name}" if path else name):
      if not one.holds(value):
        raise ConfigError(f"{key} is {value}; it must {one.wish(value)}")


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
  if isinstance(value, Mapping):
    for name, item in value.items():
      yield from _numbers(item, f"{path}.{name}")
  elif isinstance(value, list | tuple):
    for index, item in enumerate(value):
      yield from _numbers(item, f"{path}.{index}")
  elif isinstance(value, int | float) and not isinstance(value, bool):
    yield path, value

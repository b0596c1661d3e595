"""Settings of a run's checkpoints."""

import dataclasses
from typing import Literal

from jaxllm.base.ranges import Count


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: Count = 500  # steps; 0: only at the end
  keep_last: Count = 2  # the newest stays in any case
  keep_best: Count = 1  # by `best_metric`, among steps where it was measured; 0: none
  best_metric: str = "eval/loss"
  best_mode: Literal["auto", "min", "max"] = "auto"  # which is better; "auto": by the metric's name, else the lowest
  keep_every: Count | None = None  # also keep for ever each multiple of this many steps
  asynchronous: bool = True

  @property
  def highest(self) -> bool:
    """Whether more of `best_metric` is better."""
    return self.best_mode == "max" or self.best_mode == "auto" and bool(higher_is_better(self.best_metric))


_MORE = ("accuracy", "accuracies", "f1", "margins")
_LESS = ("loss", "perplexity", "bits_per_byte")


def higher_is_better(metric: str) -> bool | None:
  """Whether more of a metric is better, by the end of its name; None: it does not say."""
  last = metric.rsplit("/", 1)[-1]
  if any(last == name or last.endswith("_" + name) for name in _MORE):
    return True
  return False if any(last == name or last.endswith("_" + name) for name in _LESS) else None

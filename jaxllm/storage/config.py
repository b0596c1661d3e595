"""Settings of a run's checkpoints."""

import dataclasses

from jaxllm.base.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int = 500  # steps; 0: only at the end
  keep_last: int = 2  # the newest stays in any case
  keep_best: int = 1  # by the lowest `best_metric` among steps where it was measured; 0: none
  best_metric: str = "eval/loss"
  keep_every: int | None = None  # also keep for ever each multiple of this many steps
  asynchronous: bool = True

  def __post_init__(self):
    for name in ("every", "keep_last", "keep_best", "keep_every"):
      if (getattr(self, name) or 0) < 0:
        raise ConfigError(f"checkpoint.{name} is {getattr(self, name)}; it must not be negative")

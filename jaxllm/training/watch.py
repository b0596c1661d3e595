"""What the figures of evaluations decide: which step is the best, and whether a run goes on.

All follows from metrics.jsonl, so that a run that was killed decides as one that was not.
"""

import json
import math
from pathlib import Path

from jaxllm.base.errors import ConfigError
from jaxllm.base.files import write_atomically
from jaxllm.parallel import agreement
from jaxllm.storage.config import CheckpointConfig, higher_is_better
from jaxllm.training.compile import Program
from jaxllm.training.config import EarlyStoppingConfig, TrainingConfig
from jaxllm.training.evaluation import Evaluation
from jaxllm.training.files import METRICS, read_metrics

BEST = "best.json"
_REPLAY = "replay/loss"
Figures = dict[str, float]


class Watch:
  """The evaluations of a run so far; the same on all processes.

  Args:
    training: the settings.
    directory: the run's, whose best.json says which step is the best.
    seen: the figures of earlier evaluations, by step.
  """

  def __init__(self, training: TrainingConfig, directory: Path, seen: dict[int, Figures]):
    self._training, self._directory, self._seen = training, directory, dict(seen)
    self._recorded: int | None = None

  def see(self, step: int, figures: Figures) -> None:
    """The figures of an evaluation, all that there are of this step."""
    self._seen[step] = dict(figures)

  @property
  def best(self) -> tuple[int, float] | None:
    """The best step by the metric of early stopping, of equals the newest, and its value; None: there is none."""
    config, found = self._training.early_stopping, None
    if not config.patience:
      return None
    for step, value in self._values(config.metric):
      if math.isfinite(value) and (found is None or _gain(config, found[1], value) >= 0):
        found = step, value
    return found

  @property
  def forgets(self) -> str | None:
    """What to say where the loss on the replay set has risen beyond its limit, by the last evaluation."""
    values = self._values(_REPLAY)
    limit = self._training.replay_limit
    if limit is None or len(values) < 2 or values[-1][1] - values[0][1] <= limit:
      return None
    (first, before), (step, now) = values[0], values[-1]
    return (
      f"the run forgets: at step {step} its loss on training.replay_dir is {now:.4f}, {now - before:.4f} over that of "
      f"step {first}; training.replay_limit is {limit:g}. Lower optimizer.learning_rate, mix such data into "
      "data.sources or train adapters (peft.kind)"
    )

  def risen(self, prefix: str) -> str:
    """What to add to the figures of the replay set; "" to those of others."""
    values = self._values(_REPLAY)
    if prefix != _REPLAY.removesuffix("loss") or len(values) < 2:
      return ""
    return f" ({values[-1][1] - values[0][1]:+.4f} since step {values[0][0]})"

  @property
  def patience_ends(self) -> str | None:
    """What to say where the metric of early stopping has got no better for too long."""
    config, every = self._training.early_stopping, self._training.eval_every
    if not config.patience or not every:
      return None
    anchor, waited = None, 0
    for step, value in self._values(config.metric):
      if step % every:  # the end of a run that was to be shorter
        continue
      if math.isfinite(value) and (anchor is None or _gain(config, anchor, value) > config.min_delta):
        anchor, waited = value, 0
      else:
        waited += 1
      if waited >= config.patience:
        best = f": {config.metric} is {self.best[1]:.4f} at step {self.best[0]}" if self.best else ""
        return f"stopping early at step {step}, after {waited} evaluations without an improvement{best}"
    return None

  @property
  def ended(self) -> bool:
    """Whether the run takes no more steps."""
    return self.patience_ends is not None or (self.forgets is not None and self._training.on_forgetting == "stop")

  def record(self, saved: list[int]) -> None:
    """Writes best.json where the best step is another one now, and is saved; all processes call it."""
    if self.best is None or self.best[0] == self._recorded or self.best[0] not in saved:
      return
    step, value = self.best
    facts = {"step": step, "metric": self._training.early_stopping.metric, "value": value}
    agreement.first_does(lambda: write_atomically(self._directory / BEST, json.dumps(facts) + "\n"))
    self._recorded = step

  def _values(self, metric: str) -> list[tuple[int, float]]:
    return [(step, figures[metric]) for step, figures in sorted(self._seen.items()) if metric in figures]


def _gain(config: EarlyStoppingConfig, before: float, now: float) -> float:
  """By how much `now` is better."""
  return now - before if _highest(config) else before - now


def _highest(config: EarlyStoppingConfig) -> bool:
  return config.mode == "max" or config.mode == "auto" and bool(higher_is_better(config.metric))


def evaluations_so_far(directory: Path) -> dict[int, Figures]:
  """The figures of evaluations by step, as metrics.jsonl has them; the same on all processes, which all call this."""

  def read() -> list:
    seen: dict[int, Figures] = {}
    for line in read_metrics(directory / METRICS):
      figures = {name: v for name, v in line.items() if name.startswith(("eval", "replay/"))}
      if figures:
        seen.setdefault(line["step"], {}).update(figures)
    return list(seen.items())

  found = agreement.first_does(read)
  return {step: {name: math.nan if v is None else v for name, v in figures.items()} for step, figures in found}


def checkpoints_to_keep(checkpoint: CheckpointConfig, training: TrainingConfig) -> dict:
  """The settings of checkpoints that keep the best step by the metric of early stopping, where there is that."""
  config = training.early_stopping
  if not config.patience:
    return {}
  mode = "max" if _highest(config) else "min"
  return {"best_metric": config.metric, "best_mode": mode, "keep_best": max(checkpoint.keep_best, 1)}


def check_early_stopping(
  training: TrainingConfig, program: Program, heldout: Evaluation | None, replay: Evaluation | None
) -> None:
  """That the metric of early stopping will be measured.

  Raises:
    ConfigError: it will not; the message lists those that will.
  """
  metric = training.early_stopping.metric
  if not training.early_stopping.patience:
    return
  found = []
  for prefix, one in (("eval/", heldout), ("replay/", replay)):
    found += [prefix + name for name in one.figures(program)] if one is not None else []
  if training.ema_decay is not None:
    found += [name.replace("eval/", "eval_ema/", 1) for name in found if name.startswith("eval/")]
  if metric not in found:
    raise ConfigError(
      f"training.early_stopping.metric {metric!r} is not measured; "
      + (f"there are {', '.join(found)}" if found else "nothing is held out: raise data.heldout_fraction")
    )

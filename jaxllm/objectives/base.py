"""What an objective is: one frozen dataclass whose fields are its settings, and all that the loop asks of it."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig
from jaxllm.data.tasks import Row, empty_row
from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import Transformer

Batch = dict[str, Any]  # arrays [B, ...], or dicts of them: what `Objective.row` says, with a leading axis
Sum = Float[Array, ""]
# A sum and its weight by name. A pair of vectors is one ratio for each class, of which the metric is the mean.
Metrics = dict[str, tuple[Any, Any]]
Models = Mapping[str, Transformer]  # "policy", which is trained, and the `others` that an objective names


class Loss(NamedTuple):
  """Sums over a batch; they are divided once, over all micro-batches and hosts."""

  total: Sum  # of the weighted losses, in nats
  weight: Sum
  metrics: Metrics


class Objective:
  """The base of all objectives.

  A subclass is a frozen dataclass in a file of its own and one entry of `registry.AnyObjective`; see
  docs/adding_an_objective.md.
  """

  name: ClassVar[str]  # objective.name
  architectures: ClassVar[tuple[str, ...]]  # the values of model.architecture that work
  heads_and_tasks: ClassVar[tuple[tuple[str, str], ...]]  # of model.head and data.task together
  # Models it needs besides "policy", which are frozen. One with a field of its name is read from the path in it; with
  # an empty path, or without a field, it is the policy as it began, which costs no memory under adapters.
  others: ClassVar[tuple[str, ...]] = ()
  # A model besides the policy whose `scores` of each row are computed once, before step 0, and come with the batch
  cached: str = ""
  routers: ClassVar[bool] = False  # whether it adds the losses of routers, which a model with experts needs
  writes_text: ClassVar[bool] = False  # whether the model continues text: it is sampled from, and has bits per byte

  def check(self, model: ModelConfig, data: DataConfig) -> None:
    """That model and data fit the objective.

    Raises:
      ConfigError: they do not.
    """
    if model.architecture not in self.architectures:
      raise ConfigError(
        f"objective.name {self.name!r} needs model.architecture {' or '.join(map(repr, self.architectures))}, not "
        f"{model.architecture!r}"
      )
    if (model.head, data.task) not in self.heads_and_tasks:
      wanted = " or ".join(f"model.head {head!r} with data.task {task!r}" for head, task in self.heads_and_tasks)
      raise ConfigError(f"objective.name {self.name!r} needs {wanted}; they are {model.head!r} and {data.task!r}")
    if model.moe is not None and not self.routers:
      raise ConfigError(
        f"objective.name {self.name!r} has no losses for routers; a model with experts needs 'causal_lm'"
      )

  def row(self, data: DataConfig, seq_len: int) -> Row:
    """The batch that it reads: one row of padding, with the names, shapes and dtypes that all rows have."""
    return empty_row(data, seq_len)

  @property
  def uncached(self) -> "Objective":
    """The same with the model `cached` among `others`."""
    return self

  def scores(self, model: Transformer, batch: Batch) -> Batch:
    """What the model `cached` says of each row of a batch: entries of `row`, with the names that they have there."""
    raise NotImplementedError

  def __call__(self, models: Models, batch: Batch, key: jax.Array | None = None) -> Loss:
    """The loss of a batch, pure; `key` is for what it draws."""
    raise NotImplementedError

  def figures(self, totals: Metrics, text_bytes: float | None = None) -> dict[str, float]:
    """What describes held-out data, from the metrics' sums over all of it.

    Args:
      text_bytes: of the text that the targets stand for, where there is one.

    Returns:
      The mean of each metric; of "nll" it is called "loss", with its perplexity beside it.
    """
    means = {name: mean_ratio(*pair) for name, pair in totals.items()}
    if "nll" in means:
      loss = means.pop("nll")
      means |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
      if self.writes_text and text_bytes is not None:
        means["bits_per_byte"] = float(totals["nll"][0]) / math.log(2) / text_bytes
    return means


def mean_ratio(total: np.ndarray, weight: np.ndarray) -> float:
  """The mean of total / weight where there is weight; NaN where there is none."""
  seen = weight != 0
  return float(np.mean(total[seen] / weight[seen])) if seen.any() else math.nan

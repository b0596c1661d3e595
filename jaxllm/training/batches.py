"""What the loop asks for batches: prepared data on disk, or whatever else makes them."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jaxllm.data.heldout import HeldoutBatches, heldout_batches
from jaxllm.data.manifest import Prepared
from jaxllm.data.pipeline import TrainBatches, train_batches
from jaxllm.models.build import Params
from jaxllm.objectives.base import Batch
from jaxllm.parallel.batch import local_rows
from jaxllm.training.compile import Program
from jaxllm.training.config import RunConfig

logger = logging.getLogger("jaxllm")


class Batches(Protocol):
  """Where batches come from. Every process has one of its own and makes the same calls in the same order."""

  heldout: Iterable[Batch] | None  # batches to evaluate on, the same each time; None: there are none

  @property
  def epochs(self) -> float:
    """Passes over the data so far."""

  def next(self, policy: Callable[[], Params]) -> Batch | None:
    """The next batch: of the arrays of `Objective.row` this process's rows, `local_rows(program.batch)`.

    Args:
      policy: the parameters as they are now, valid until this returns. Data on disk does not ask for them.

    Returns:
      None at the end.
    """

  def get_state(self) -> Any:
    """What `set_state` needs to go on from here: JSON values, the same on all processes."""

  def set_state(self, state: Any) -> None:
    """Goes on from where `get_state` was called."""

  def close(self) -> None:
    """Ends what runs in the background."""


MakeBatches = Callable[[Program, RunConfig, Prepared], Batches]


class DiskBatches:
  """Prepared data, whatever the weights are."""

  def __init__(self, rows: TrainBatches, heldout: HeldoutBatches | None):
    self._rows = rows
    self.heldout: Iterable[Batch] | None = heldout
    self._parts: list[Any] = list(rows.sources.values())
    if heldout is not None:
      self._parts += [part.rows for part in heldout.parts]

  @property
  def epochs(self) -> float:
    return self._rows.epochs

  def next(self, policy: Callable[[], Params]) -> Batch | None:
    return next(self._rows, None)

  @property
  def num_rows(self) -> int:
    """Rows that training and evaluation can ever read, on all hosts; `data.epochs` and other limits aside."""
    return sum(map(len, self._parts))

  def row(self, number: int) -> Batch:
    """One of them, as it is in the first pass over the data."""
    for part in self._parts:
      if number < len(part):
        return part[number]
      number -= len(part)
    raise IndexError(number)

  def get_state(self) -> Any:
    return self._rows.get_state()

  def set_state(self, state: Any) -> None:
    self._rows.set_state(state)

  def close(self) -> None:
    self._rows.close()


def disk_batches(program: Program, run: RunConfig, prepared: Prepared) -> Batches:
  """The prepared data of a config, training rows and held-out ones.

  Raises:
    DataError, ConfigError: see `train_batches`.
  """
  training = run.training
  shared = dict(
    batch_size=training.batch_size,
    seq_len=training.seq_len,
    decoder_start_id=run.model.decoder_start_id,
    rows=local_rows(program.batch),
    prepared=prepared,
  )
  rows = train_batches(run.data, **shared, seed=training.seed)  # type: ignore[arg-type]
  heldout = None  # where nothing is held out there is nothing to evaluate
  if prepared.total("heldout", "tokens"):
    heldout = heldout_batches(run.data, **shared, max_batches=training.eval_batches)  # type: ignore[arg-type]
  elif prepared.total("heldout", "documents"):
    logger.warning("nothing to evaluate on: each held-out row is bad, see %s", prepared.skipped_path)
  return DiskBatches(rows, heldout)

"""Batches for training: packed rows, shuffled, mixed and read by index.

Every row has an index in one global sequence that depends on the data, the settings and the seed alone. So
the position in the data is one number, which a run can continue with other hosts, workers or batch sizes:
batch b of a run with any hosts and mesh holds the very rows that one host would read.
"""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jaxllm.base import children
from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT
from jaxllm.data.manifest import Prepared, digest, open_prepared
from jaxllm.data.packing import Plan
from jaxllm.data.plans import plan_of
from jaxllm.data.shards import TokenDocuments
from jaxllm.data.tasks import Task, empty_row, make_task, stacked

Batch = dict[str, Any]  # arrays [rows, ...] by name, or such dicts: what `jaxllm.data.tasks.empty_row` has


class PackedRows(grain.MapDataset):
  """The rows of one source; index // len(self) is the epoch, as in grain's own datasets.

  What a row draws depends on the seed and its index, counted from `first`, alone, and is another in each epoch.
  """

  def __init__(self, documents: TokenDocuments, plan: Plan, task: Task, seed: int, first: int = 0):
    super().__init__()
    self.plan = plan
    self._documents, self._task, self._seed, self._first = documents, task, seed, first

  def __len__(self) -> int:
    return self.plan.num_rows

  def __getitem__(self, index):
    epoch, row = divmod(index, self.plan.num_rows)
    rng = np.random.default_rng([self._seed, self._first + index])
    return self._task.row(self.plan.pieces(epoch, row), self._documents, rng)


class HostBatches(grain.MapDataset):
  """One host's rows of consecutive global batches, which go from global row `start` up to `end`.

  `rows` are the rows of each batch that it reads, ascending. The last batch is filled up with empty rows, so all
  hosts see equally many batches.
  """

  def __init__(
    self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int], start: int, end: int, empty: Batch
  ):
    super().__init__(parent)
    self._empty, self._batch_size, self._rows, self._start, self._end = empty, batch_size, rows, start, end

  def __len__(self) -> int:
    return max(0, -(-(self._end - self._start) // self._batch_size))

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    first = self._start + index * self._batch_size
    rows = [self._parent[first + row] for row in self._rows if first + row < self._end]
    return stacked(rows + [self._empty] * (len(self._rows) - len(rows)))


class TrainBatches(grain.DatasetIterator[Batch]):
  """Iterator over batches; its state is small, JSON, and independent of hosts, workers and batch size."""

  def __init__(
    self,
    dataset: grain.MapDataset,
    *,
    key: str,
    batch_size: int,
    rows: Sequence[int],
    config: DataConfig,
    sources: dict[str, PackedRows],
    shares: dict[str, float],
    empty: Batch,
  ):
    super().__init__()
    self.sources = sources  # the rows of each
    self._dataset, self._key, self._config, self._empty = dataset, key, config, empty
    self._batch_size, self._rows = batch_size, rows
    self._shares = shares
    self.rows_per_epoch = sum(map(len, sources.values()))
    self._end = sys.maxsize if config.epochs is None else math.ceil(config.epochs * self.rows_per_epoch)
    self._consumed = 0
    self._iterator: grain.DatasetIterator | None = None

  @property
  def epochs(self) -> float:
    """Passes over the mixture so far: rows read, of as many rows as all sources have together."""
    return min(self._consumed, self._end) / self.rows_per_epoch

  @property
  def source_epochs(self) -> dict[str, float]:
    """Passes over each source so far; unlike `epochs` where weights are not in proportion to size."""
    rows = min(self._consumed, self._end)
    return {name: rows * self._shares[name] / len(source) for name, source in self.sources.items()}

  @property
  def dropped_tokens(self) -> dict[str, int]:
    """Tokens per epoch that no row holds, by source: what "none" truncates, and what is left out of chat."""
    return {name: source.plan.dropped_tokens for name, source in self.sources.items()}

  def __next__(self) -> Batch:
    self._assert_not_closed()
    if self._iterator is None:
      with children.deaf_children() if self._config.workers else contextlib.nullcontext():
        self._iterator = self._open()
        batch = next(self._iterator)  # which starts the workers
    else:
      batch = next(self._iterator)
    self._consumed += self._batch_size
    return batch

  def _open(self) -> grain.DatasetIterator:
    batches = HostBatches(self._dataset, self._batch_size, self._rows, self._consumed, self._end, self._empty)
    config = self._config
    if config.workers:
      _mark_flags_parsed()
      dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
      ahead = max(1, config.prefetch // config.workers)
      options = grain.MultiprocessingOptions(num_workers=config.workers, per_worker_buffer_size=ahead)
      return iter(dataset.mp_prefetch(options, worker_init_fn=_begin_worker))
    # One thread: more would only fight over the interpreter lock and the document cache.
    threads = 1 if config.prefetch else 0
    return iter(batches.to_iter_dataset(grain.ReadOptions(threads, config.prefetch)))

  def get_state(self) -> dict[str, Any]:
    return {"rows": self._consumed, "key": self._key}

  def set_state(self, state: dict[str, Any]) -> None:
    """Raises DataError when the state belongs to other data, another seed or another sequence length."""
    if state["key"] != self._key:
      raise DataError(
        "the checkpoint's place in the data belongs to other data settings (data, training.seq_len or "
        "training.seed), or to data that another version of jaxllm has prepared: restore them, or start a new run "
        "directory"
      )
    self._release()
    self._consumed = int(state["rows"])

  def close(self) -> None:
    self._release()
    super().close()

  def _release(self) -> None:
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None


def _begin_worker(number: int, count: int) -> None:
  children.end_with_parent()


def _mark_flags_parsed() -> None:
  """Grain's workers read absl flags, which only absl programs parse."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def checked_rows(rows: Sequence[int] | None, batch_size: int) -> Sequence[int]:
  """`rows`, or all rows of a batch for None; raises ConfigError when they are not ascending rows of a batch."""
  if rows is None:
    return range(batch_size)
  if not len(rows) or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
    raise ConfigError(f"the rows that a host reads must be ascending row numbers of a batch of {batch_size}")
  return tuple(int(row) for row in rows)


def train_batches(
  config: DataConfig,
  *,
  batch_size: int,
  seq_len: int,
  seed: int,
  rows: Sequence[int] | None = None,
  prepared: Prepared | None = None,
  decoder_start_id: int = 0,
) -> TrainBatches:
  """Batches of the training split of `config.dir`: dicts of [len(rows), seq_len] arrays.

  `rows` are the rows of each batch that this host reads, ascending (`jaxllm.parallel.batch.local_rows`); None: all.

  `inputs, targets, positions, segment_ids` are int32, `loss_weights` float32; segment 0 is padding, weight 0.
  Other tasks than "text" have more entries, or other shapes: `jaxllm.data.tasks.empty_row`. A source's weight is
  its share of the rows. Rows are shuffled anew in each pass over a source.

  Raises DataError when nothing (or something else) is prepared there, ConfigError when `rows` are not rows of a
  batch or no source has a weight above 0.
  """
  rows = checked_rows(rows, batch_size)
  if config.epochs is not None and config.epochs <= 0:
    raise ConfigError(f"data.epochs is {config.epochs}; it must be above 0, or None for no limit")
  prepared = open_prepared(config) if prepared is None else prepared
  weights = _weights(config, prepared)
  task = make_task(config, seq_len, prepared, decoder_start_id)
  datasets, sources = [], {}
  for index, source in enumerate(prepared.sources):
    if source.name not in weights:
      continue
    # Grain shuffles pass n with seed + n, so sources must be far apart.
    source_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    plan = plan_of(
      task,
      prepared,
      source,
      "train",
      config=config,
      packing=config.packing,
      seq_len=seq_len,
      seed=source_seed if config.shuffle else None,
      decoder_start_id=decoder_start_id,
    )
    if not plan.num_rows:
      raise DataError(f"no row of data source {source.name!r} is left to train on: each is bad, or held out")
    packed = PackedRows(prepared.documents(source, "train"), plan, task, source_seed)
    datasets.append((packed.shuffle(source_seed) if config.shuffle else packed).repeat())
    sources[source.name] = packed
  shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
  mixture = grain.MapDataset.mix(datasets, list(shares.values())) if len(datasets) > 1 else datasets[0]
  facts = [prepared.content, config.packing, config.shuffle, seq_len, seed, weights]
  if config.task in CHAT:
    facts += [config.task, config.truncation]
  elif config.task != "text":
    facts += [config.task, dataclasses.asdict(config.corruption), config.target_len, decoder_start_id]
  return TrainBatches(
    mixture,
    key=digest(facts),
    batch_size=batch_size,
    rows=rows,
    config=config,
    sources=sources,
    shares=shares,
    empty=empty_row(config, seq_len),
  )


def _weights(config: DataConfig, prepared: Prepared) -> dict[str, float]:
  """Weight by source name, of the sources that take part: weight above 0 and something to train on."""
  pairs = zip(prepared.sources, config.sources)
  weights = {info.name: float(source.weight) for info, source in pairs if source.weight and info.train.documents}
  if not weights:
    raise ConfigError("no data source has a weight above 0 and documents to train on")
  return weights

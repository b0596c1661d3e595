"""Batches for evaluation: every held-out token once, always the same, with the bytes that they stand for."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, PARTS
from jaxllm.data.manifest import Prepared, open_prepared
from jaxllm.data.packing import TablePlan, random_order
from jaxllm.data.pipeline import Batch, PackedRows, checked_rows
from jaxllm.data.plans import plan_of
from jaxllm.data.tasks import empty_row, make_task, stacked


class HeldoutBatches:
  """Iterates, as often as wanted, over the same batches, of which it gives the rows that one host reads.

  A batch holds rows of one source, so that its sums are those of a source. Documents are cut into windows of seq_len
  without overlap (a window's first token is predicted from the one before it, nothing earlier), and windows share
  rows without seeing each other. `bytes` is what the scored tokens stand for in the raw text, over all hosts: bits
  per byte is the sum of all hosts' losses in nats, over ln 2 and over bytes. `tokens` counts the targets, each
  document's EOS included. Of instruction data, of which only a part is scored, there are no `bytes`.
  """

  def __init__(
    self,
    parts: Sequence["HeldoutPart"],
    empty: Batch,
    *,
    batch_size: int,
    max_batches: int,
    rows: Sequence[int],
    all_is_scored: bool,
  ):
    self.parts = parts
    self._empty, self._batch_size, self._rows = empty, batch_size, rows
    self._batches = self._ordered()[: max_batches or None]
    read: list[np.ndarray] = [
      np.concatenate([np.zeros(0, np.int64), *(rows for n, rows in self._batches if n == number)])
      for number in range(len(parts))
    ]
    scored = [part.scored(rows) for part, rows in zip(parts, read)]
    self.tokens = sum(tokens for tokens, _ in scored)
    self.source_bytes = {part.name: size for part, (_, size) in zip(parts, scored)} if all_is_scored else {}
    self.bytes = sum(self.source_bytes.values()) if all_is_scored else None

  def _ordered(self) -> list[tuple[int, np.ndarray]]:
    """The rows of each batch, with the number of their source, which is one.

    In a fixed shuffled order, so that the first batches are a fair sample; sources take turns by their sizes.
    """
    found = []
    for number, part in enumerate(self.parts):
      order = random_order(len(part.rows), 0, 0)
      count = -(-len(order) // self._batch_size)
      for batch in range(count):
        rows = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        found.append(((batch + 0.5) / count, number, rows))
    return [(number, rows) for _, number, rows in sorted(found, key=lambda one: one[:2])]

  @property
  def sources(self) -> list[str]:
    """Whose rows each batch holds."""
    return [self.parts[number].name for number, _ in self._batches]

  def __len__(self) -> int:
    return len(self._batches)

  def __iter__(self) -> Iterator[Batch]:
    for number, batch in self._batches:
      rows = [self.parts[number].rows[int(batch[row])] for row in self._rows if row < len(batch)]
      rows += [self._empty] * (len(self._rows) - len(rows))
      yield stacked(rows)


class HeldoutPart(NamedTuple):
  """What of one source is held out."""

  name: str
  rows: PackedRows  # all, in the data's order; what they draw is counted on from the sources before
  plan: TablePlan
  lengths: Int[np.ndarray, " documents"]  # bytes of each document

  def scored(self, rows: Int[np.ndarray, " rows"]) -> tuple[int, float]:
    """Positions in these rows, and the bytes that they stand for.

    A document that is scored in part counts in part; with all rows this is the exact sum.
    """
    plan, count = self.plan, len(self.lengths)
    row_of_piece = np.repeat(np.arange(plan.num_rows), np.diff(plan.row_offsets))
    here = np.isin(row_of_piece, rows) if len(rows) < plan.num_rows else slice(None)
    scored = np.bincount(plan.documents[here], plan.sizes[here], count)
    whole = np.bincount(plan.documents, plan.sizes, count)
    return int(scored.sum()), float((self.lengths * (scored / np.maximum(whole, 1))).sum())


def heldout_batches(
  config: DataConfig,
  *,
  batch_size: int,
  seq_len: int,
  max_batches: int = 0,
  source: str = "",
  rows: Sequence[int] | None = None,
  prepared: Prepared | None = None,
  decoder_start_id: int = 0,
) -> HeldoutBatches:
  """The held-out split of `config.dir` in batches as `train_batches` gives them.

  `max_batches` 0 takes everything, `source` "" all sources. Raises DataError when nothing is held out, ConfigError
  when `rows` are not rows of a batch.
  """
  prepared = open_prepared(config) if prepared is None else prepared
  rows = checked_rows(rows, batch_size)
  task = make_task(config, seq_len, prepared, decoder_start_id)
  prepared_as = (prepared.config.get("examples") or [None])[0]
  if prepared_as != (config.task if config.task in PARTS else None):
    raise DataError(f"{prepared.dir} was prepared for data.task {prepared_as or 'text'!r}, not for {config.task!r}")
  parts: list[HeldoutPart] = []
  lengths, failures, first_length, first_row = prepared.heldout_lengths(), [], 0, 0
  for info in prepared.sources:
    last = first_length + info.heldout.documents
    if info.heldout.documents and source in ("", info.name):
      documents = prepared.documents(info, "heldout")  # what is damaged is an error of its own
      try:
        plan = plan_of(
          task, prepared, info, "heldout", config=config, packing="best_fit", seq_len=seq_len, seed=None,
          decoder_start_id=decoder_start_id,
        )  # fmt: skip
      except DataError as error:
        failures.append(error)
      else:
        assert isinstance(plan, TablePlan)
        rows_here = PackedRows(documents, plan, task, 0, first_row)
        parts.append(HeldoutPart(info.name, rows_here, plan, lengths[first_length:last]))
        first_row += plan.num_rows
    first_length = last
  if not parts and failures:
    raise DataError(f"of the held-out rows {failures[0]}") from failures[0]
  if not parts:
    raise DataError(
      f"no held-out documents{f' of source {source!r}' if source else ''} in {prepared.dir}: raise "
      "data.heldout_fraction and prepare again"
    )
  if not first_row:
    raise DataError(f"each held-out row in {prepared.dir} is bad, see {prepared.skipped_path}")
  return HeldoutBatches(
    parts,
    empty_row(config, seq_len),
    batch_size=batch_size,
    max_batches=max_batches,
    rows=rows,
    all_is_scored=config.task not in CHAT,
  )

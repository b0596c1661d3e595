"""Batches for evaluation: every held-out token once, always the same, with the bytes that they stand for."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, PARTS
from jaxllm.data.manifest import Prepared, open_prepared
from jaxllm.data.packing import TablePlan, random_order
from jaxllm.data.pipeline import Batch, checked_rows
from jaxllm.data.plans import plan_of
from jaxllm.data.shards import TokenDocuments
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
    prepared: Prepared,
    *,
    batch_size: int,
    seq_len: int,
    max_batches: int = 0,
    source: str = "",
    rows: Sequence[int] | None = None,
    config: DataConfig = DataConfig(),
    decoder_start_id: int = 0,
  ):
    self._batch_size, self._rows = batch_size, checked_rows(rows, batch_size)
    self._task, self._empty = make_task(config, seq_len, prepared, decoder_start_id), empty_row(config, seq_len)
    prepared_as = (prepared.config.get("examples") or [None])[0]
    if prepared_as != (config.task if config.task in PARTS else None):
      raise DataError(f"{prepared.dir} was prepared for data.task {prepared_as or 'text'!r}, not for {config.task!r}")
    self._parts: list[_Part] = []  # sources one after another, documents and rows numbered on
    lengths, failures, first_length = prepared.heldout_lengths(), [], 0
    for info in prepared.sources:
      last = first_length + info.heldout.documents
      if info.heldout.documents and source in ("", info.name):
        documents = prepared.documents(info, "heldout")  # what is damaged is an error of its own
        try:
          plan = plan_of(
            self._task, prepared, info, "heldout", config=config, packing="best_fit", seq_len=seq_len, seed=None,
            decoder_start_id=decoder_start_id,
          )  # fmt: skip
        except DataError as error:
          failures.append(error)
        else:
          assert isinstance(plan, TablePlan)
          self._parts.append(_Part(info.name, documents, plan, lengths[first_length:last]))
      first_length = last
    if not self._parts and failures:
      raise DataError(f"of the held-out rows {failures[0]}") from failures[0]
    if not self._parts:
      raise DataError(
        f"no held-out documents{f' of source {source!r}' if source else ''} in {prepared.dir}: raise "
        "data.heldout_fraction and prepare again"
      )
    self._first_rows = np.cumsum([0, *(part.plan.num_rows for part in self._parts)])
    self._first_documents = np.cumsum([0, *(len(part.documents) for part in self._parts)])
    if not self._first_rows[-1]:
      raise DataError(f"each held-out row in {prepared.dir} is bad, see {prepared.skipped_path}")
    self._batches = self._ordered()[: max_batches or None]
    read: list[np.ndarray] = [
      np.concatenate([np.zeros(0, np.int64), *(rows for n, rows in self._batches if n == number)])
      for number in range(len(self._parts))
    ]
    scored = [part.scored(rows) for part, rows in zip(self._parts, read)]
    self.tokens = sum(tokens for tokens, _ in scored)
    self.source_bytes = (
      {part.name: size for part, (_, size) in zip(self._parts, scored)} if config.task not in CHAT else {}
    )
    self.bytes = sum(self.source_bytes.values()) if config.task not in CHAT else None

  def _ordered(self) -> list[tuple[int, np.ndarray]]:
    """The rows of each batch, with the number of their source, which is one.

    In a fixed shuffled order, so that the first batches are a fair sample; sources take turns by their sizes.
    """
    found = []
    for number, part in enumerate(self._parts):
      order = random_order(part.plan.num_rows, 0, 0)
      count = -(-len(order) // self._batch_size)
      for batch in range(count):
        rows = order[batch * self._batch_size : (batch + 1) * self._batch_size]
        found.append(((batch + 0.5) / count, number, rows))
    return [(number, rows) for _, number, rows in sorted(found, key=lambda one: one[:2])]

  @property
  def sources(self) -> list[str]:
    """Whose rows each batch holds."""
    return [self._parts[number].name for number, _ in self._batches]

  def __len__(self) -> int:
    return len(self._batches)

  def __iter__(self) -> Iterator[Batch]:
    for number, batch in self._batches:
      first = int(self._first_rows[number])
      rows = [self._row(first + int(batch[row])) for row in self._rows if row < len(batch)]
      rows += [self._empty] * (len(self._rows) - len(rows))
      yield stacked(rows)

  def _row(self, row: int) -> Batch:
    number = int(np.searchsorted(self._first_rows, row, "right")) - 1
    first = int(self._first_documents[number])
    pieces = self._parts[number].plan.pieces(0, row - int(self._first_rows[number]))
    pieces = [piece._replace(document=piece.document + first) for piece in pieces]
    return self._task.row(pieces, self, np.random.default_rng([0, row]))

  @property
  def every_row(self) -> Sequence[Batch]:
    """All rows that there are, beyond `max_batches` too, in the data's order; each is made when it is asked for."""
    return _Rows(self._row, int(self._first_rows[-1]))

  def _find(self, document: int) -> tuple[TokenDocuments, int]:
    number = int(np.searchsorted(self._first_documents, document, "right")) - 1
    return self._parts[number].documents, document - int(self._first_documents[number])

  def framed(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """As `TokenDocuments.framed`, sources numbered on."""
    documents, index = self._find(document)
    return documents.framed(index, start, stop)

  def parts(self, document: int) -> list[np.ndarray]:
    """As `TokenDocuments.parts`, sources numbered on."""
    documents, index = self._find(document)
    return documents.parts(index)


class _Part(NamedTuple):
  """What of one source is held out."""

  name: str
  documents: TokenDocuments
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


class _Rows(Sequence):
  """Rows by number."""

  def __init__(self, make: Callable[[int], Batch], count: int):
    self._make, self._count = make, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, row):
    return self._make(row)


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
  return HeldoutBatches(
    open_prepared(config) if prepared is None else prepared,
    batch_size=batch_size,
    seq_len=seq_len,
    max_batches=max_batches,
    source=source,
    rows=rows,
    config=config,
    decoder_start_id=decoder_start_id,
  )

"""Batches for evaluation: every held-out token once, always the same, with the bytes that they stand for."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, PARTS
from jaxllm.data.manifest import Prepared, open_prepared
from jaxllm.data.packing import random_order
from jaxllm.data.pipeline import Batch, checked_rows
from jaxllm.data.tasks import empty_row, make_task, stacked


class HeldoutBatches:
  """Iterates, as often as wanted, over the same batches, of which it gives the rows that one host reads.

  Documents are cut into windows of seq_len without overlap (a window's first token is predicted from the one
  before it, nothing earlier), and windows share rows without seeing each other. `bytes` is what the scored
  tokens stand for in the raw text, over all hosts: bits per byte is the sum of all hosts' losses in nats,
  over ln 2 and over bytes. `tokens` counts the targets, each document's EOS included. Of instruction data, of which
  only a part is scored, there are no `bytes`.
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
    self._documents, counts, sizes = [], [], []  # sources one after another, numbered on
    first_byte_length = 0
    lengths = prepared.heldout_lengths()
    for info in prepared.sources:
      last = first_byte_length + info.heldout.documents
      if info.heldout.documents and source in ("", info.name):
        documents = prepared.documents(info, "heldout")
        self._documents += [(documents, index) for index in range(info.heldout.documents)]
        counts.append(prepared.token_counts(info, "heldout"))
        sizes.append(lengths[first_byte_length:last])
      first_byte_length = last
    if not counts:
      raise DataError(
        f"no held-out documents{f' of source {source!r}' if source else ''} in {prepared.dir}: raise "
        "data.heldout_fraction and prepare again"
      )
    document_bytes = np.concatenate(sizes)
    try:
      self._plan = self._task.plan(np.concatenate(counts), "best_fit", None)
    except DataError as error:
      raise DataError(f"of the held-out rows {error}") from error
    if not self._plan.num_rows:
      raise DataError(f"each held-out row in {prepared.dir} is bad, see {prepared.skipped_path}")
    # In a fixed shuffled order, so that the first batches are a fair sample.
    self._order = random_order(self._plan.num_rows, 0, 0)
    if max_batches:
      self._order = self._order[: max_batches * batch_size]
    # A document that is scored in part counts in part; with all batches this is the exact sum.
    scored = self._sizes(self._order, len(document_bytes))
    whole = self._sizes(range(self._plan.num_rows), len(document_bytes))
    self.tokens = int(scored.sum())
    self.bytes = float((document_bytes * (scored / np.maximum(whole, 1))).sum()) if config.task not in CHAT else None

  def _sizes(self, rows: Iterable[int], documents: int) -> Int[np.ndarray, " documents"]:
    """Positions of each document in these rows."""
    sizes = np.zeros(documents, np.int64)
    for row in rows:
      for piece in self._plan.pieces(0, int(row)):
        sizes[piece.document] += piece.size
    return sizes

  def __len__(self) -> int:
    return -(-len(self._order) // self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    for start in range(0, len(self._order), self._batch_size):
      batch = self._order[start : start + self._batch_size]
      rows = [self._row(int(batch[row])) for row in self._rows if row < len(batch)]
      rows += [self._empty] * (len(self._rows) - len(rows))
      yield stacked(rows)

  def _row(self, row: int) -> Batch:
    return self._task.row(self._plan.pieces(0, row), self, np.random.default_rng([0, row]))

  @property
  def every_row(self) -> Sequence[Batch]:
    """All rows that there are, beyond `max_batches` too, in the data's order; each is made when it is asked for."""
    return _Rows(self._row, self._plan.num_rows)

  def framed(self, document: int) -> np.ndarray:
    """As `TokenDocuments.framed`, sources numbered on."""
    documents, index = self._documents[document]
    return documents.framed(index)

  def parts(self, document: int) -> list[np.ndarray]:
    """As `TokenDocuments.parts`, sources numbered on."""
    documents, index = self._documents[document]
    return documents.parts(index)


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

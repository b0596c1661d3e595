"""Which pieces of which documents make up each row: pure index arithmetic over document lengths.

A document of n tokens fills n + 1 positions: it starts with the start token (BOS, or EOS where there is no
BOS) and ends by predicting EOS. So each of its tokens, EOS included, is a target exactly once, and no target
ever crosses into another document.
"""

import bisect
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxllm.data.arrays import kept_arrays

Packing = Literal["split", "first_fit", "best_fit", "none"]
Order = Int[np.ndarray, " documents"]
Pieces = tuple[np.ndarray, np.ndarray, np.ndarray]  # of each its document, start and size
_KEPT_EPOCHS = 3  # on the disk
_BLOCK = 1 << 20  # random numbers drawn together
_OPEN_ROWS = 512  # rows that the fits keep filling; textbook first-fit keeps all, in time quadratic in documents


class Piece(NamedTuple):
  """`size` positions of a document, from position `start` on."""

  document: int
  start: int
  size: int


@dataclasses.dataclass(kw_only=True)
class Plan:
  """Which pieces stand in each row of an epoch, and what stands in none."""

  dropped_tokens: int = 0  # targets per epoch that no row holds
  dropped_documents: int = 0  # that no row holds any of
  cut_documents: int = 0  # of which rows hold a part

  @property
  def num_rows(self) -> int:
    raise NotImplementedError

  @property
  def lost(self) -> dict[str, int]:
    """What stands in no row, by name."""
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(Plan)}

  def pieces(self, epoch: int, row: int) -> list[Piece]:
    raise NotImplementedError


def make_plan(
  packing: Packing, lengths: Int[np.ndarray, " documents"], seq_len: int, seed: int | None, frame: int = 0
) -> Plan:
  """How documents of `lengths` + `frame` positions fill rows of `seq_len`.

  "split": documents one after another, cut wherever a row ends; order and cuts change each epoch.
  "first_fit", "best_fit": documents stay whole where seq_len allows, longer ones are cut into pieces of
  seq_len and a rest. "none": one document a row, truncated. `seed` None keeps the corpus' order.
  """
  if packing == "split":
    return SplitPlan(lengths, seq_len, seed, frame)
  lengths = lengths.astype(np.int64) + frame
  if packing == "none":
    documents = np.arange(len(lengths))
    sizes = np.minimum(lengths, seq_len)
    dropped = int(np.sum(lengths) - np.sum(sizes))
    return TablePlan(documents, np.zeros_like(documents), sizes, np.arange(len(lengths) + 1), dropped_tokens=dropped)
  pieces = cut_documents(lengths, order_of(lengths, seed), seq_len)
  return fit_pieces(pieces, pieces[2][:, None], (seq_len,), packing)


def order_of(counts: Int[np.ndarray, " documents *parts"], seed: int | None) -> Order:
  """The documents in the order in which they are packed, without examples that were skipped, which have no tokens."""
  order = np.arange(len(counts)) if seed is None else random_order(len(counts), seed, 0)
  return order if counts.ndim == 1 else order[counts.sum(1)[order] > 0]


def random_order(count: int, seed: int, stream: int) -> Order:
  """A permutation that is the same in every numpy version: Philox's raw stream is specified."""
  return np.concatenate([np.zeros(0, np.int64), *order_in_parts(count, seed, stream, max(count, 1))])


def order_in_parts(count: int, seed: int, stream: int, at_once: int = 1 << 24) -> Iterator[Order]:
  """`random_order` in parts of about `at_once`, of which one is in memory at a time."""
  parts = max(1, -(-count // at_once))
  edges = [round(2**64 * part / parts) for part in range(parts + 1)]
  for low, high in zip(edges, edges[1:]):
    generator = np.random.Philox(key=np.array([seed, stream], np.uint64))
    bits, indices = [], []
    for start in range(0, count, _BLOCK):
      drawn = generator.random_raw(min(_BLOCK, count - start))
      here = np.flatnonzero((drawn >= np.uint64(low)) & (drawn <= np.uint64(high - 1)))
      bits.append(drawn[here])
      indices.append(here + start)
    if indices:
      yield np.concatenate(indices)[np.argsort(np.concatenate(bits), kind="stable")]


@dataclasses.dataclass
class SplitPlan(Plan):
  """One stream of all documents per epoch, cut every seq_len; only the last row may have padding.

  With a seed, each epoch has its own document order, and the first row starts at its own place in the stream
  (what was before comes last), so that even a corpus of one document is cut elsewhere each time.
  """

  lengths: Int[np.ndarray, " documents"]  # less `frame`
  seq_len: int
  seed: int | None
  frame: int = 0
  store: Path | None = None  # where each epoch's order is kept; None: in memory

  def __post_init__(self):
    self._total = int(self.lengths.sum(dtype=np.int64)) + self.frame * len(self.lengths)
    self._epoch: Callable = functools.lru_cache(maxsize=2)(self._make_epoch)  # two: reading ahead

  def __getstate__(self):
    return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

  def __setstate__(self, state):
    self.__init__(**state)

  @property
  def num_rows(self) -> int:
    return -(-self._total // self.seq_len)

  def _make_epoch(self, epoch: int) -> tuple[Order, Int[np.ndarray, " documents_plus_1"], int]:
    """Document order, where in the stream each starts (the last entry: where it ends), and the first cut."""
    offset = 0
    if self.seed is not None:
      draw = np.random.Philox(key=np.array([self.seed, 2 * epoch + 1], np.uint64)).random_raw()
      offset = int(draw % self.seq_len) % self._total
    kept = None
    if self.store is not None:
      kept = kept_arrays(self.store / f"epoch-{epoch}", lambda: self._epoch_in_parts(epoch))
      if epoch >= _KEPT_EPOCHS:
        shutil.rmtree(self.store / f"epoch-{epoch - _KEPT_EPOCHS}", ignore_errors=True)
    if kept is None:
      parts = list(self._epoch_in_parts(epoch, len(self.lengths)))
      kept = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return kept["order"], kept["starts"], offset

  def _epoch_in_parts(self, epoch: int, at_once: int = 1 << 24) -> Iterator[dict[str, np.ndarray]]:
    count, end = len(self.lengths), 0
    yield {"order": np.zeros(0, np.uint32 if count < 2**32 else np.uint64), "starts": np.zeros(1, np.int64)}
    if self.seed is not None:
      parts = order_in_parts(count, self.seed, 2 * epoch, max(at_once, 1))
    else:
      parts = (np.arange(start, min(start + at_once, count)) for start in range(0, count, max(at_once, 1)))
    for order in parts:
      starts = end + np.cumsum(self.lengths[order].astype(np.int64) + self.frame)
      end = int(starts[-1]) if len(starts) else end
      yield {"order": order.astype(np.uint32 if count < 2**32 else np.uint64), "starts": starts}

  def pieces(self, epoch, row):
    order, starts, offset = self._epoch(epoch)
    first = offset + row * self.seq_len
    last = offset + min((row + 1) * self.seq_len, self._total)
    pieces = []
    for begin, end in ((first, min(last, self._total)), (max(first - self._total, 0), last - self._total)):
      index = int(np.searchsorted(starts, begin, side="right")) - 1
      while begin < end:
        size = min(end, int(starts[index + 1])) - begin
        pieces.append(Piece(int(order[index]), begin - int(starts[index]), size))
        begin += size
        index += 1
    return pieces


@dataclasses.dataclass
class TablePlan(Plan):
  """Rows spelled out; each epoch has the same ones in another order, since segments see only themselves."""

  documents: Int[np.ndarray, " pieces"]
  starts: Int[np.ndarray, " pieces"]
  sizes: Int[np.ndarray, " pieces"]
  row_offsets: Int[np.ndarray, " rows_plus_1"]

  @property
  def num_rows(self) -> int:
    return len(self.row_offsets) - 1

  def pieces(self, epoch, row):
    first, last = self.row_offsets[row], self.row_offsets[row + 1]
    return [
      Piece(int(d), int(s), int(n))
      for d, s, n in zip(self.documents[first:last], self.starts[first:last], self.sizes[first:last])
    ]


def cut_documents(lengths: Int[np.ndarray, " documents"], order: Order, most: int) -> Pieces:
  """Documents in pieces that are each at most `most` long."""
  counts = -(-lengths[order] // most)
  documents = np.repeat(order, counts)
  within = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
  starts = within * most
  return documents, starts, np.minimum(lengths[documents] - starts, most)


def fit_pieces(
  pieces: Pieces, costs: Int[np.ndarray, "pieces sides"], capacity: tuple[int, ...], packing: Packing
) -> TablePlan:
  """First-fit, or best-fit (the fullest row that has room), over the last `_OPEN_ROWS` opened rows; "none": one a row.

  A row holds `capacity` positions on each of its sides (of an encoder-decoder there are two), and a piece
  costs that many of them.
  """
  if packing == "none":
    return TablePlan(*pieces, np.arange(len(costs) + 1))
  if packing == "best_fit" and len(capacity) == 1:
    rows, num_rows = _best_fit(costs[:, 0], capacity[0])
  else:
    rows, num_rows = _fit(costs, capacity, tightest=packing == "best_fit")
  by_row = np.argsort(rows, kind="stable")
  offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
  return TablePlan(*(part[by_row] for part in pieces), offsets)


def _fit(
  costs: Int[np.ndarray, "pieces sides"], capacity: tuple[int, ...], tightest: bool
) -> tuple[Int[np.ndarray, " pieces"], int]:
  """The row of each piece and how many rows there are."""
  rows = np.empty(len(costs), np.int64)
  room = np.zeros((_OPEN_ROWS, len(capacity)), np.int64)
  row_of_slot = np.zeros(_OPEN_ROWS, np.int64)
  num_rows, next_slot = 0, 0
  for piece, cost in enumerate(costs):
    if (cost == capacity).any():
      rows[piece] = num_rows
      num_rows += 1
      continue
    slots = np.flatnonzero((room >= cost).all(1))
    if len(slots) == 0:
      slot, next_slot = next_slot, (next_slot + 1) % _OPEN_ROWS
      room[slot], row_of_slot[slot] = capacity, num_rows
      num_rows += 1
    elif tightest:
      slot = slots[np.argmin(room[slots].sum(1))]
    else:
      slot = slots[np.argmin(row_of_slot[slots])]
    room[slot] -= cost
    rows[piece] = row_of_slot[slot]
  return rows, num_rows


def _best_fit(costs: Int[np.ndarray, " pieces"], capacity: int) -> tuple[Int[np.ndarray, " pieces"], int]:
  """What `_fit` does with one side and `tightest`, ten times as fast."""
  rows = np.empty(len(costs), np.int64)
  free: list[tuple[int, int]] = []  # (room, slot) of the open rows, sorted
  room, row_of_slot = [0] * _OPEN_ROWS, [0] * _OPEN_ROWS
  num_rows = next_slot = 0
  for first in range(0, len(costs), _BLOCK):
    for piece, cost in enumerate(costs[first : first + _BLOCK].tolist(), first):
      if cost == capacity:
        rows[piece] = num_rows
        num_rows += 1
        continue
      at = bisect.bisect_left(free, (cost, -1))
      if at < len(free):
        slot = free.pop(at)[1]
      else:
        slot, next_slot = next_slot, (next_slot + 1) % _OPEN_ROWS
        if room[slot]:  # its row is closed
          del free[bisect.bisect_left(free, (room[slot], slot))]
        room[slot], row_of_slot[slot] = capacity, num_rows
        num_rows += 1
      room[slot] -= cost
      if room[slot]:
        bisect.insort(free, (room[slot], slot))
      rows[piece] = row_of_slot[slot]
  return rows, num_rows

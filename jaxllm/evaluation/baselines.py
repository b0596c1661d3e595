"""What general compressors and an n-gram model make of the same bytes: the bars a language model must clear."""

import itertools
import lzma
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

Text = bytes | Iterable[bytes]  # in pieces, of which a few are in memory at once
_BLOCK = 1 << 24  # bytes that are counted together


def gzip_bits_per_byte(text: Text) -> float:
  """Size under gzip -9 in bits per byte of input (DEFLATE with gzip's 18 bytes of header and trailer)."""
  return _compressed_bits(text, zlib.compressobj(9, zlib.DEFLATED, 31))


def xz_bits_per_byte(text: Text) -> float:
  """Size under xz -9e in bits per byte of input."""
  return _compressed_bits(text, lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME))


def _compressed_bits(text: Text, compressor: Any) -> float:
  size = packed = 0
  for piece in _pieces(text):
    size += len(piece)
    packed += len(compressor.compress(piece))
  return 8 * (packed + len(compressor.flush())) / size


def _pieces(text: Text) -> Iterable[bytes]:
  return [text] if isinstance(text, bytes) else text


def _blocks(text: Text, order: int) -> Iterator[tuple[int, UInt8[np.ndarray, " n"]]]:
  """The text in blocks, each with the last `order` bytes of what stands before it, and how many these are."""
  before, size = b"", 0
  held: list[bytes] = []
  for piece in itertools.chain(_pieces(text), [b""]):  # the last one ends the text
    held.append(piece)
    size += len(piece)
    if size >= _BLOCK or (not piece and size):
      block = before + b"".join(held)
      yield len(before), np.frombuffer(block, np.uint8)
      before, held, size = block[max(len(block) - order, 0) :] if order else b"", [], 0


class ByteNGram:
  """An interpolated byte n-gram model with Witten-Bell smoothing (Witten and Bell 1991, method C).

  p_k(c | h) = (count(h c) + types(h) p_{k-1}(c | h')) / (count(h) + types(h)), where h' is the context h
  without its oldest byte, types(h) the number of distinct bytes seen after h, and p_{-1} is uniform. Its memory grows
  with the different contexts of the text that it counts, not with the text that it is measured on.
  """

  def __init__(self, order: int = 5):
    if not 0 <= order <= 7:  # a context and its next byte share one 64-bit word
      raise ValueError(f"order {order} is not between 0 and 7")
    self.order = order
    self.tables: list[tuple[np.ndarray, ...]] = []

  def fit(self, text: Text) -> "ByteNGram":
    """Counts every context of up to `order` bytes."""
    counted = [(np.zeros(0, np.uint64), np.zeros(0, np.int64)) for _ in range(self.order + 1)]
    for known, block in _blocks(text, self.order):
      for k, (grams, counts) in enumerate(counted):
        # Those that end in what was known already have been counted.
        new, times = np.unique(_grams(block, k)[max(known - k, 0) :], return_counts=True)
        both, places = np.unique(np.concatenate([grams, new]), return_inverse=True)
        counted[k] = both, np.bincount(places, np.concatenate([counts, times]), len(both)).astype(np.int64)
    self.tables = []
    for grams, counts in counted:
      contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
      totals = np.add.reduceat(counts, starts) if len(starts) else counts
      types = np.diff(np.append(starts, len(grams)))
      self.tables.append((grams, counts, contexts, totals, types))
    return self

  def probabilities(self, data: bytes) -> Float[np.ndarray, " n"]:
    """The probability of each byte given the ones before it."""
    return self._probabilities(np.frombuffer(data, np.uint8))

  def _probabilities(self, text: UInt8[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    p = np.full(len(text), 1 / 256)
    for k, (grams, counts, contexts, totals, types) in enumerate(self.tables):
      wanted = _grams(text, k)
      count = _lookup(grams, counts, wanted)
      total = _lookup(contexts, totals, wanted >> np.uint64(8))
      kinds = _lookup(contexts, types, wanted >> np.uint64(8))
      tail = p[k:]
      seen = total > 0
      tail[seen] = (count[seen] + kinds[seen] * tail[seen]) / (total[seen] + kinds[seen])
    return p

  def bits_per_byte(self, text: Text) -> float:
    """Cross-entropy on a text, in bits per byte."""
    bits, size = 0.0, 0
    for known, block in _blocks(text, self.order):
      bits -= float(np.log2(self._probabilities(block)[known:]).sum())
      size += len(block) - known
    return bits / size


def _grams(text: UInt8[np.ndarray, " n"], k: int) -> np.ndarray:
  """Each byte with the k bytes before it, as one integer; the byte itself is the lowest."""
  grams = np.zeros(max(len(text) - k, 0), np.uint64)
  for i in range(k + 1):
    grams = (grams << np.uint64(8)) | text[i : len(text) - k + i].astype(np.uint64)
  return grams


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  if not len(keys):
    return np.zeros(len(wanted), np.int64)
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, values[at], 0)

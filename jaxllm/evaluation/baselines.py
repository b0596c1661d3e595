"""What general compressors and an n-gram model make of the same bytes: the bars a language model must clear."""

import lzma
import zlib

import numpy as np
from jaxtyping import Float, UInt8


def gzip_bits_per_byte(data: bytes) -> float:
  """Size under gzip -9 in bits per byte of input (DEFLATE with gzip's 18 bytes of header and trailer)."""
  return 8 * (len(zlib.compress(data, 9, 31))) / len(data)


def xz_bits_per_byte(data: bytes) -> float:
  """Size under xz -9e in bits per byte of input."""
  return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


class ByteNGram:
  """An interpolated byte n-gram model with Witten-Bell smoothing (Witten and Bell 1991, method C).

  p_k(c | h) = (count(h c) + types(h) p_{k-1}(c | h')) / (count(h) + types(h)), where h' is the context h
  without its oldest byte, types(h) the number of distinct bytes seen after h, and p_{-1} is uniform.
  """

  def __init__(self, order: int = 5):
    if not 0 <= order <= 7:  # a context and its next byte share one 64-bit word
      raise ValueError(f"order {order} is not between 0 and 7")
    self.order = order
    self.tables: list[tuple[np.ndarray, ...]] = []

  def fit(self, data: bytes) -> "ByteNGram":
    """Counts every context of up to `order` bytes."""
    text = np.frombuffer(data, np.uint8)
    self.tables = []
    for k in range(self.order + 1):
      grams, counts = np.unique(_grams(text, k), return_counts=True)
      contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
      totals = np.add.reduceat(counts, starts)
      types = np.diff(np.append(starts, len(grams)))
      self.tables.append((grams, counts, contexts, totals, types))
    return self

  def probabilities(self, data: bytes) -> Float[np.ndarray, " n"]:
    """The probability of each byte given the ones before it."""
    text = np.frombuffer(data, np.uint8)
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

  def bits_per_byte(self, data: bytes) -> float:
    """Cross-entropy on `data`, in bits per byte."""
    return float(-np.log2(self.probabilities(data)).mean())


def _grams(text: UInt8[np.ndarray, " n"], k: int) -> np.ndarray:
  """Each byte with the k bytes before it, as one integer; the byte itself is the lowest."""
  grams = np.zeros(max(len(text) - k, 0), np.uint64)
  for i in range(k + 1):
    grams = (grams << np.uint64(8)) | text[i : len(text) - k + i].astype(np.uint64)
  return grams


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
  at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
  return np.where(keys[at] == wanted, values[at], 0)

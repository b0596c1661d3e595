"""Where words and sentences begin and end, told from a tokenizer's pieces alone."""

import dataclasses
import functools
import unicodedata

import numpy as np
from jaxtyping import Bool, Int, Int32

from jaxllm.data.tokenizers import Tokenizer

_SENTENCE_ENDS = tuple(mark.encode() for mark in ".!?。！？")
Flags = Bool[np.ndarray, " V"]
# Scripts that put no spaces between words. In the first group each character is a word: ideographs, kana of Japanese
# and the scripts of which line breaks need a dictionary (Thai, Lao, Myanmar, Khmer and their neighbours).
_ALONE = (
  (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B), (0x3041, 0x309F), (0x3400, 0x4DBF),
  (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x17000, 0x18DFF), (0x1B130, 0x1B2FF), (0x20000, 0x3FFFD),
  (0xE01, 0xE3A), (0xE40, 0xE4E), (0xE81, 0xECF), (0xEDC, 0xEDF), (0x1000, 0x103F), (0x1050, 0x108F),
  (0x109A, 0x109F), (0x1780, 0x17D3), (0x17DC, 0x17DD), (0x1950, 0x197F), (0x1980, 0x19CF), (0x1A20, 0x1A7F),
  (0xA9E0, 0xA9EF), (0xAA60, 0xAADF), (0x11700, 0x1172F),
)  # fmt: skip
_KATAKANA = ((0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0x32D0, 0x3357), (0xFF66, 0xFF9D))
_SPACED, _CHARACTERS, _RUNS, _MARKS = range(4)
_LEAST = 0xE0  # the first byte of each of these characters, and none of a character before U+0800


@dataclasses.dataclass(frozen=True)
class Words:
  """Facts about each id of a vocabulary.

  A word begins at a piece that brings white space before it (SentencePiece's ▁, byte-level BPE's Ġ, WordPiece's
  pieces without ##) and after one that ends in white space, a line's end for example. In scripts without spaces it
  begins where Unicode's default rules have it (UAX #29, without a dictionary): at every ideograph, as BERT has it for
  Chinese, every hiragana and every Thai, Lao, Khmer or Myanmar letter, with the marks on it; at a run of katakana;
  and at what follows one of them. A piece is never cut: one of several characters is a word.
  """

  begins: Flags
  ends: Flags  # in white space: what follows begins a word
  ends_sentence: Flags
  ordinary: Flags  # stands for text; the others are special
  pieces: tuple[bytes, ...]
  unspaced: Flags  # may hold a character, or a part of one, of a script without spaces

  def number(self, ids: Int[np.ndarray, " T"], whole: bool = True) -> Int[np.ndarray, " T"]:
    """The number of the word that each token belongs to, from 0; -1 for special tokens, which part words.

    `whole` False: every token is a word.
    """
    special = ~self.ordinary[ids]
    begins = self.begins[ids] | special | (not whole)
    begins[1:] |= (self.ends[ids] | special)[:-1]
    if whole and self.unspaced[ids].any():
      begins |= self._at_characters(ids)
    begins[:1] = True
    return np.where(special, -1, np.cumsum(begins) - 1)

  def _at_characters(self, ids: Int[np.ndarray, " T"]) -> Bool[np.ndarray, " T"]:
    """Whether a token begins where a word of a script without spaces does, or ends. A character may be cut in pieces,
    so the row is read as a whole.
    """
    pieces = [self.pieces[i] or b"\n" for i in ids]  # a special token parts characters
    starts = np.cumsum([0, *map(len, pieces[:-1])])
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int32)
    escaped = (points >= 0xDC80) & (points <= 0xDCFF)
    widths = 1 + (~escaped) * ((points >= 0x80).astype(int) + (points >= 0x800) + (points >= 0x10000))
    kinds = _kinds()[points]
    # A mark belongs to the character before it.
    base = np.maximum.accumulate(np.where(kinds != _MARKS, np.arange(len(kinds)), 0))
    kinds, marks = np.where(kinds[base] == _MARKS, _SPACED, kinds[base]), kinds == _MARKS
    new = (kinds == _CHARACTERS) | np.diff(kinds, prepend=_SPACED).astype(bool)
    at = np.zeros(int(widths.sum()) + 1, bool)
    at[np.cumsum(widths) - widths] = new & ~marks
    return at[starts]


@functools.cache
def _kinds() -> Int32[np.ndarray, " characters"]:
  """The kind of each character of Unicode."""
  kinds = np.full(0x110000, _SPACED, np.int8)
  for kind, ranges in ((_CHARACTERS, _ALONE), (_RUNS, _KATAKANA)):
    for first, last in ranges:
      kinds[first : last + 1] = kind
      if last < 0x20000:
        marks = [i for i in range(first, last + 1) if unicodedata.category(chr(i)).startswith("M")]
        kinds[marks] = _MARKS
  kinds[[0x200C, 0x200D, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), 0xFF9E, 0xFF9F]] = _MARKS
  return kinds


def words_of(tokenizer: Tokenizer) -> Words:
  """The table of a tokenizer's vocabulary."""
  pieces = tokenizer.pieces()
  return Words(
    begins=np.array([piece[:1].isspace() for piece in pieces]),
    ends=np.array([piece[-1:].isspace() for piece in pieces]),
    ends_sentence=np.array([piece.rstrip().endswith(_SENTENCE_ENDS) for piece in pieces]),
    ordinary=np.array([bool(piece) for piece in pieces]),
    pieces=tuple(pieces),
    unspaced=np.array([max(piece, default=0) >= _LEAST for piece in pieces]),
  )

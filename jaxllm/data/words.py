"""Where words and sentences begin and end, told from a tokenizer's pieces alone."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from jaxllm.data.tokenizers import Tokenizer

_SENTENCE_ENDS = tuple(mark.encode() for mark in ".!?。！？")
Flags = Bool[np.ndarray, " V"]


@dataclasses.dataclass(frozen=True)
class Words:
  """Facts about each id of a vocabulary.

  A word begins at a piece that brings white space before it (SentencePiece's ▁, byte-level BPE's Ġ, WordPiece's
  pieces without ##) and after one that ends in white space, a line's end for example.
  """

  begins: Flags
  ends: Flags  # in white space: what follows begins a word
  ends_sentence: Flags
  ordinary: Flags  # stands for text; the others are special

  def number(self, ids: Int[np.ndarray, " T"], whole: bool = True) -> Int[np.ndarray, " T"]:
    """The number of the word that each token belongs to, from 0; -1 for special tokens, which part words.

    `whole` False: every token is a word.
    """
    special = ~self.ordinary[ids]
    begins = self.begins[ids] | special | (not whole)
    begins[1:] |= (self.ends[ids] | special)[:-1]
    begins[:1] = True
    return np.where(special, -1, np.cumsum(begins) - 1)


def words_of(tokenizer: Tokenizer) -> Words:
  """The table of a tokenizer's vocabulary."""
  pieces = tokenizer.pieces()
  return Words(
    begins=np.array([piece[:1].isspace() for piece in pieces]),
    ends=np.array([piece[-1:].isspace() for piece in pieces]),
    ends_sentence=np.array([piece.rstrip().endswith(_SENTENCE_ENDS) for piece in pieces]),
    ordinary=np.array([bool(piece) for piece in pieces]),
  )

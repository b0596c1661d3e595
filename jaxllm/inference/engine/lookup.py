"""Drafts by lookup: what followed when the text last stood like this (Saxena, Prompt Lookup Decoding, 2023)."""

from collections.abc import Sequence


class Lookup:
  """An index of one text's runs of `low` to `high` tokens, of each the place behind its last occurrence."""

  def __init__(self, low: int, high: int, before: Sequence[int] = ()):
    """`before`: tokens that are no part of the text, but from which it may repeat: an encoder's."""
    self._sizes = range(high, low - 1, -1)
    self._text = [*before, -1] if before else []  # -1: no run goes over it
    self._behind: dict[tuple[int, ...], int] = {}
    self._indexed = 0
    self._offset = len(self._text)

  def propose(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
    """What may follow these tokens, which begin with those of the call before; at most so many, perhaps none."""
    self._text += tokens[len(self._text) - self._offset :]
    end = len(self._text)
    for place in range(self._indexed, end):  # runs that end before the last token
      for size in self._sizes:
        if size <= place:
          self._behind[tuple(self._text[place - size : place])] = place
    self._indexed = max(self._indexed, end)
    for size in self._sizes:
      found = self._behind.get(tuple(self._text[end - size :])) if size <= end else None
      if found is not None:
        # Where the text repeats with a period shorter than `most`, it goes on as the drafts do.
        drafts: list[int] = []
        period = end - found
        while len(drafts) < most:
          place = found + len(drafts)
          drafts.append(self._text[place] if place < end else drafts[len(drafts) - period])
        return tuple(drafts[: drafts.index(-1)] if -1 in drafts else drafts)
    return ()

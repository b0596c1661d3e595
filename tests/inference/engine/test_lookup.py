"""Drafts by lookup, against a search through the whole text."""

import hypothesis.strategies as st
from hypothesis import given, settings

from jaxllm.inference.engine.lookup import Lookup


def searched(text, low, high, most):
  """What followed the last earlier occurrence of the longest end of the text."""
  for size in range(high, low - 1, -1):
    for end in range(len(text) - 1, size - 1, -1):
      if size <= len(text) and text[end - size : end] == text[len(text) - size :]:
        found = list(text)
        while len(found) < len(text) + most:
          found.append(found[end + len(found) - len(text)])
        return tuple(found[len(text) :])
  return ()


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.data())
def test_as_a_search_finds_it_however_the_text_grows(text, low, more, data):
  lookup, place = Lookup(low, low + more), 0
  while place < len(text):
    place = min(len(text), place + data.draw(st.integers(1, 9)))
    assert lookup.propose(text[:place], 5) == searched(text[:place], low, low + more, 5)


def test_repeats_what_an_encoder_has_read_but_not_over_its_end():
  lookup = Lookup(2, 3, before=[5, 6, 7, 8])
  assert lookup.propose([1, 5, 6], 5) == (7, 8)
  assert lookup.propose([1, 5, 6, 7, 8], 5) == ()

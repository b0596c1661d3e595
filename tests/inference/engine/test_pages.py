"""Pages alone: what a pool must never do, whatever rows come and go."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxllm.inference.engine.pages import NOBODYS, PagePool, Pages, first_key, next_key

SIZE = 4


def keys_of(tokens, *facts):
  key, keys = first_key(*facts), []
  for start in range(0, len(tokens) - SIZE + 1, SIZE):
    key = next_key(key, tokens[start : start + SIZE])
    keys.append(key)
  return keys


def test_the_page_that_was_idle_for_longest_is_taken_first():
  pool = PagePool(3)
  pages = [pool.take() for _ in range(3)]
  for page, key in zip(pages, (b"a", b"b", b"c")):
    pool.name(page, key)
  for page in (pages[1], pages[0], pages[2]):
    pool.give_back(page)
  assert pool.available == 3
  pool.hold(b"b")  # is used again, and so not taken
  assert [pool.take(), pool.take()] == [pages[0], pages[2]]
  assert (pool.find(b"a"), pool.find(b"b"), pool.find(b"c")) == (None, pages[1], None)
  assert pool.available == 0


def test_a_beginning_is_found_under_its_facts_only():
  tokens = list(range(11))
  base = keys_of(tokens, "0", "", ())
  others = [("1", "", ()), ("0", "salt", ()), ("0", "", (1,)), ("0", "", (1, 2))]
  assert all(not set(base) & set(keys_of(tokens, *facts)) for facts in others)
  assert keys_of([9, *tokens[1:]], "0", "", ())[1] != base[1]  # the tokens before a page count
  pages = Pages({"global": 8}, SIZE)
  held = pages.begin(base, 11)
  pages.extend(held, 11)
  pages.name(held, base, 11)
  again = pages.begin(base, 11)
  assert again.pages["global"] == held.pages["global"][:2]
  assert pages.begin(keys_of(tokens, "1", "", ()), 11).pages["global"] == []


def test_one_token_is_always_left_to_compute():
  tokens = list(range(8))
  pages, keys = Pages({"global": 8}, SIZE), keys_of(tokens)
  held = pages.begin(keys, 8)
  pages.extend(held, 8)
  pages.name(held, keys, 8)
  assert len(pages.begin(keys, 8)) == 1
  assert len(pages.begin(keys, 9)) == 2


def test_behind_a_window_pages_go_back_and_are_not_needed_again():
  pages = Pages({"local": 6, "global": 12}, SIZE, window=5, sink_tokens=1)
  tokens = list(range(20))
  keys, held = keys_of(tokens), pages.begin([], 20)
  pages.extend(held, 20)
  pages.name(held, keys, 16)
  pages.slide(held, 16)  # which sees 12 to 16
  kept = held.pages["local"]
  assert [page == NOBODYS for page in kept] == [False, True, True, False, False]
  assert pages.pools["local"].available == 3
  for page in [pages.pools["local"].take() for _ in range(3)]:  # what was behind the window is written over
    pages.pools["local"].give_back(page)
  again = pages.begin(keys, 17)
  assert again.pages["local"] == [kept[0], NOBODYS, NOBODYS, kept[3]]
  assert again.pages["global"] == held.pages["global"][:4]
  pages.release(again)
  assert len(pages.begin(keys, 16)) == 1  # 12 would see from 8 on, and 8 from 4 on, which are gone


def test_spoiled_pages_are_not_found():
  pages, keys = Pages({"global": 4}, SIZE), keys_of(range(8))
  held = pages.begin(keys, 8)
  pages.extend(held, 8)
  pages.name(held, keys, 8)
  pages.release(held, spoiled=True)
  assert len(pages.begin(keys, 9)) == 0


@pytest.mark.parametrize(
  "tokens, window, sinks, pages, lack",
  [
    (16, None, 0, 4, None),
    (17, None, 0, 4, "5 global pages of 4 tokens, and there are 4"),
    (99, 6, 0, 3, None),  # positions 3 to 8 lie in three pages
    (99, 6, 0, 2, "3 local pages"),
    (99, 5, 0, 2, None),
    (99, 1, 0, 1, None),
    (99, 6, 1, 3, "4 local pages"),
    (8, 6, 1, 2, None),
  ],
)
def test_what_never_fits(tokens, window, sinks, pages, lack):
  kind = "global" if window is None else "local"
  found = Pages({kind: pages}, SIZE, window=window, sink_tokens=sinks).lacks(tokens)
  assert found is None if lack is None else lack in found


class Checked:
  """Pages beside a plain account of which tokens lie in which page."""

  def __init__(self, pages):
    self.pages, self.rows = pages, []
    self.text = {kind: {} for kind in pages.pools}  # page -> the tokens up to its end, that were written

  def check(self):
    for kind, pool in self.pages.pools.items():
      held = [page for _, row, _ in self.rows for page in row.pages[kind] if page != NOBODYS]
      assert all(1 <= page <= pool.count for page in held)
      assert pool.available == pool.count - len(set(held))
      for page in {page for page in held if held.count(page) > 1}:  # a shared page is full
        assert len(self.text[kind][page]) % SIZE == 0
    for tokens, row, computed in self.rows:
      for kind, ids in row.pages.items():
        for index, page in enumerate(ids):
          if page != NOBODYS and index * SIZE < computed:
            assert self.text[kind][page] == tokens[: min(computed, (index + 1) * SIZE)]

  def write(self, number, count):
    tokens, row, computed = self.rows[number]
    self.pages.slide(row, computed)
    end = min(computed + count, len(tokens), self.pages.room(row))
    self.pages.extend(row, end)
    for position in range(computed, end):
      for kind, ids in row.pages.items():
        self.text[kind][ids[position // SIZE]] = tokens[: position + 1]
    self.rows[number] = tokens, row, end
    self.pages.name(row, keys_of(tokens), end)


@settings(max_examples=150, deadline=None)
@given(
  st.lists(
    st.one_of(
      st.tuples(st.just("begin"), st.integers(0, 3), st.integers(1, 30)),
      st.tuples(st.just("write"), st.integers(0, 9), st.integers(1, 9)),
      st.tuples(st.just("release"), st.integers(0, 9), st.booleans()),
    ),
    max_size=60,
  ),
  st.sampled_from([None, 1, 4, 7]),
  st.integers(0, 5),
)
def test_every_row_finds_its_own_tokens_in_its_pages(actions, window, sinks):
  kinds = {"global": 12} if window is None else {"global": 12, "local": 9}
  checked = Checked(Pages(kinds, SIZE, window=window, sink_tokens=sinks))
  for action, a, b in actions:
    if action == "begin":
      tokens = [a // 2] * 6 + [a] * 24  # two of the four begin alike
      row = checked.pages.begin(keys_of(tokens[:b]), b)
      if row is not None:
        checked.rows.append((tokens[:b], row, len(row) * SIZE))
    elif checked.rows and action == "write":
      checked.write(a % len(checked.rows), b)
    elif checked.rows:
      checked.pages.release(checked.rows.pop(a % len(checked.rows))[1], spoiled=b)
    checked.check()
  for _, row, _ in checked.rows:
    checked.pages.release(row)
  assert checked.pages.available == checked.pages.total

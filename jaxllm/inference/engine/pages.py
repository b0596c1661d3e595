"""Pages of the key/value cache, on the host: who holds which, which may be shared, which go first. No jax here.

A page is written by one row only, token after token. When it is full and its tokens are known it may be shared: it is
found again under a key, a hash of these tokens and of all before them. So nobody ever writes to a page that two hold.
A page that nobody holds stays where it is for as long as nobody needs the room, the least recently used going first.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

NOBODYS = 0  # a page of zeros that is never written: what a row's table names where it has given a page back


def first_key(*facts: str | int | Sequence[int]) -> bytes:
  """The key before a row's first page: of all that keys and values depend on besides the tokens before them."""
  return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()


def next_key(key: bytes, tokens: Sequence[int]) -> bytes:
  """The key of a page with these tokens, behind the one with the key `key`."""
  return hashlib.blake2b(key + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class PagePool:
  """The pages 1 to `count` of one kind of layer."""

  def __init__(self, count: int):
    self.count = count
    self._free = collections.deque(range(1, count + 1))
    self._holders = [0] * (count + 1)
    self._page_of: dict[bytes, int] = {}
    self._key_of: dict[int, bytes] = {}
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # with a key, held by nobody

  @property
  def available(self) -> int:
    """Pages that `take` can give."""
    return len(self._free) + len(self._idle)

  def take(self) -> int:
    """A page that its caller alone holds; the one that was idle for the longest, if none is free."""
    if self._free:
      page = self._free.popleft()
    else:
      page, _ = self._idle.popitem(last=False)
      self._forget(page)
    self._holders[page] = 1
    return page

  def find(self, key: bytes) -> int | None:
    """The page with this key."""
    return self._page_of.get(key)

  def hold(self, key: bytes) -> int:
    """The page with this key, which there must be, for one more holder."""
    page = self._page_of[key]
    self._idle.pop(page, None)
    self._holders[page] += 1
    return page

  def give_back(self, page: int) -> None:
    """One holder less."""
    self._holders[page] -= 1
    if self._holders[page] == 0:
      if page in self._key_of:
        self._idle[page] = None
      else:
        self._free.append(page)

  def name(self, page: int, key: bytes) -> None:
    """From now on a held page is found under this key, unless another is."""
    if key not in self._page_of and page not in self._key_of:
      self._page_of[key], self._key_of[page] = page, key

  def forget(self, pages: Sequence[int] | None = None) -> None:
    """These pages, or all, are not found any more."""
    for page in list(self._key_of) if pages is None else pages:
      self._forget(page)
      if page in self._idle:
        del self._idle[page]
        self._free.append(page)

  def _forget(self, page: int) -> None:
    key = self._key_of.pop(page, None)
    if key is not None:
      del self._page_of[key]


@dataclasses.dataclass
class Held:
  """The pages that a row holds: of each kind, in the order of its tokens; `NOBODYS` where it has given one back."""

  pages: dict[str, list[int]]
  named: int = 0  # so many of the first ones have been given a key, where another page had it not

  def __len__(self) -> int:
    return len(next(iter(self.pages.values())))


class Pages:
  """The pages of all kinds: every row holds as many "global" as its tokens need, of "local" those that are seen.

  Args:
    counts: pages of each kind.
    window: keys that a token of a "local" layer sees, itself included.
    sink_tokens: a row's first tokens, which stay visible there.
    share: whether pages are found again.
  """

  def __init__(
    self,
    counts: Mapping[str, int],
    page_size: int,
    *,
    window: int | None = None,
    sink_tokens: int = 0,
    share: bool = True,
  ):
    self.pools = {kind: PagePool(count) for kind, count in counts.items()}
    self.page_size, self.share = page_size, share
    self._window, self._sinks = window, -(-sink_tokens // page_size)

  @property
  def total(self) -> int:
    return sum(pool.count for pool in self.pools.values())

  @property
  def available(self) -> int:
    """Those that nobody holds, shareable ones included."""
    return sum(pool.available for pool in self.pools.values())

  def least(self, tokens: int) -> dict[str, int]:
    """Pages of each kind without which a row cannot have so many tokens."""
    return {kind: self._least(kind, tokens) for kind in self.pools}

  def lacks(self, tokens: int) -> str | None:
    """Why even an empty cache cannot hold a row of so many tokens, or None."""
    for kind, pool in self.pools.items():
      need = self._least(kind, tokens)
      if need > pool.count:
        return f"{need} {kind} pages of {self.page_size} tokens, and there are {pool.count} (num_pages)"
    return None

  def begin(self, keys: Sequence[bytes], tokens: int) -> Held | None:
    """A row of `tokens` tokens with the longest beginning whose pages are found by their keys; at least one token is
    left over, from which the next is drawn. None, if there is no room now for the others."""
    count = self._found(keys[: (tokens - 1) // self.page_size]) if self.share else 0
    held = Held({}, named=count)
    for kind, pool in self.pools.items():
      held.pages[kind] = [NOBODYS] * count
      for index in self._seen(kind, count):
        held.pages[kind][index] = pool.hold(keys[index])
    need = lambda kind: self._least(kind, tokens) - len(self._seen(kind, count))  # noqa: E731
    if all(need(kind) <= pool.available for kind, pool in self.pools.items()):
      return held
    self.release(held)
    return None

  def room(self, held: Held) -> int:
    """How many tokens a row can have in all, with the pages that it holds and those that are available."""
    return (len(held) + min(pool.available for pool in self.pools.values())) * self.page_size

  def extend(self, held: Held, tokens: int) -> None:
    """Takes the pages that the row needs for so many tokens in all; there must be `room`."""
    for kind, pages in held.pages.items():
      while len(pages) * self.page_size < tokens:
        pages.append(self.pools[kind].take())

  def slide(self, held: Held, computed: int) -> None:
    """Gives back "local" pages that no token from position `computed` on sees."""
    if "local" not in held.pages:
      return
    pages = held.pages["local"]
    for index in range(self._behind(computed) - 1, self._sinks - 1, -1):
      if pages[index] == NOBODYS:
        break
      self.pools["local"].give_back(pages[index])
      pages[index] = NOBODYS

  def name(self, held: Held, keys: Sequence[bytes], computed: int) -> None:
    """Makes the row's pages findable as far as they are full and their tokens known: for any step behind that which
    computes them, and for that step itself, in which all tokens are written before any is read."""
    if not self.share:
      return
    end = min(len(keys), computed // self.page_size)
    for index in range(held.named, end):
      for kind, pages in held.pages.items():
        if pages[index] != NOBODYS:
          self.pools[kind].name(pages[index], keys[index])
    held.named = max(held.named, end)

  def release(self, held: Held, spoiled: bool = False) -> None:
    """Gives all back, the last first, so that a beginning outlives its continuation; `spoiled`: not to be found."""
    for kind, pages in held.pages.items():
      pool = self.pools[kind]
      mine = [page for page in reversed(pages) if page != NOBODYS]
      if spoiled:
        pool.forget(mine)
      for page in mine:
        pool.give_back(page)
    held.pages = {kind: [] for kind in held.pages}
    held.named = 0

  def forget(self) -> None:
    """No page is found any more: what they hold has become wrong."""
    for pool in self.pools.values():
      pool.forget()

  def _behind(self, position: int) -> int:
    """Local pages, counted from the first, that a token at `position` and those after it do not see."""
    return max(0, position - self._window + 1) // self.page_size

  def _seen(self, kind: str, count: int) -> list[int]:
    """Which of the first `count` pages a token right behind them and later ones see."""
    if kind != "local":
      return list(range(count))
    first = self._behind(count * self.page_size)
    return [index for index in range(count) if index < self._sinks or index >= first]

  def _found(self, keys: Sequence[bytes]) -> int:
    """The most pages that can be shared: where the window begins, earlier local ones need not be there."""
    there = {kind: [pool.find(key) is not None for key in keys] for kind, pool in self.pools.items()}
    unbroken = next((i for i, found in enumerate(there.get("global", ())) if not found), len(keys))
    for count in range(unbroken, 0, -1):
      if "local" not in there or all(there["local"][index] for index in self._seen("local", count)):
        return count
    return 0

  def _least(self, kind: str, tokens: int) -> int:
    """Pages without which a row cannot get to so many tokens, one by one: those of a window that begins at the end of
    a page, with sink tokens before it."""
    need = -(-tokens // self.page_size)
    if kind != "local":
      return need
    return min(need, self._sinks + (self._window + self.page_size - 2) // self.page_size + 1)

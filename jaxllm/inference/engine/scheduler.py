"""Who computes what in the next step, on the host: a budget of tokens, pages, and places on the device. No jax here."""

import bisect
import dataclasses
from collections.abc import Callable, Sequence

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.pages import Pages
from jaxllm.inference.engine.request import Row


@dataclasses.dataclass(frozen=True)
class Work:
  """A row's part of a step: `count` tokens from position `start` on, the last `drafts` of them guessed; `draws`: and
  then the next token."""

  row: Row
  start: int
  count: int
  draws: bool
  drafts: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step: every row's part, and the rows that have just been given their `slot`."""

  work: list[Work]
  admitted: list[Row]

  @property
  def tokens(self) -> int:
    return sum(one.count for one in self.work)


class Scheduler:
  """First come, first served, and nothing waits for ever.

  Rows that only need their last token computed go first, then those that are in the middle of their prompt, then, as
  far as the budget and the pages go, new ones; each group in the order of priority and arrival. When pages run out the
  row that is last in that order is sent back to wait and computes its tokens again later. The first row in order can
  so displace all others, and admission refuses what does not fit alone: it always goes on.

  Args:
    max_rows: that run at once.
    max_tokens: of a step, all rows together; at least `max_rows`.
    max_chunk: of a row in a step. What is more waits for the next one.
    facts: of a row, what its keys and values depend on besides tokens (`pages.first_key`).
    fits: whether a place on the device suits a row better than others.
    reread_beyond: a text that grows longer than this is read again from its beginning; None: none is.
  """

  def __init__(
    self,
    pages: Pages,
    max_rows: int,
    max_tokens: int,
    max_chunk: int,
    facts: Callable[[Row], Sequence[str | int | Sequence[int]]] = lambda row: (),
    fits: Callable[[int, Row], bool] = lambda slot, row: False,
    reread_beyond: int | None = None,
  ):
    self._reread_beyond = reread_beyond
    self.pages, self.max_tokens, self.max_chunk, self._facts = pages, max_tokens, max_chunk, facts
    self.waiting: list[Row] = []  # both in order
    self.running: list[Row] = []
    self.preemptions = self.prefix_queries = self.prefix_hits = 0  # the last two in tokens
    self._slots, self._fits = list(range(max_rows))[::-1], fits

  @property
  def steady(self) -> bool:
    """Whether the next step only draws: no row is in its prompt or read again, and none can come in."""
    draws = all(row.left <= 1 and not self._outgrown(row) for row in self.running)
    return draws and not (self.waiting and self._slots)

  def add(self, row: Row) -> None:
    """Lets a row wait for its turn.

    Raises:
      ConfigError: not even alone would it find room for all its tokens.
    """
    lack = self.pages.lacks(max(1, row.limit - 1))  # the last token is not computed
    if lack is not None:
      raise ConfigError(
        f"{row.begins} tokens and up to {row.limit - row.begins} more need {lack}; ask for fewer or give more pages"
      )
    bisect.insort(self.waiting, row, key=lambda one: one.order)

  def schedule(self) -> Plan:
    """The next step, which must be computed: rows are counted as that far from here on."""
    plan = Plan([], [])
    for row in self.running:
      self.pages.slide(row.held, row.computed)
    for row in [row for row in self.running if self._outgrown(row)]:
      self._wait(row)
    preempted = self.preemptions
    for row in sorted(self.running, key=lambda row: row.left > 1):  # stable
      if row.slot is not None:
        self._continue(row, plan)
    for work in plan.work:
      self._advance(work)
    while self.preemptions == preempted and self._admit(plan):
      pass
    return plan

  def finish(self, row: Row, spoiled: bool = False) -> None:
    """Takes a row out, wherever it is; `spoiled`: and nobody may read what it has computed."""
    row.finished = True
    if row.slot is None:
      self.waiting.remove(row)
    else:
      self._stop(row, spoiled)

  def restart(self) -> None:
    """All rows compute their tokens again, and nothing of before is found."""
    for row in reversed(self.running.copy()):
      self._wait(row)
    self.pages.forget()
    for row in self.waiting:
      row.keys.clear()

  def _continue(self, row: Row, plan: Plan) -> None:
    """Gives a running row what it needs, in the end at the cost of those after it."""
    count = min(row.left, self.max_tokens - plan.tokens, self.max_chunk)
    if count < 1:
      return
    while (room := self.pages.room(row.held) - row.computed) < 1 and (last := self.running[-1]) is not row:
      plan.work[:] = [work for work in plan.work if work.row is not last]
      self.preemptions += 1
      self._wait(last)
    if room >= 1:
      count = min(count, room)
      spare = min(self.max_tokens - plan.tokens, self.max_chunk, room) - count
      if self._reread_beyond is not None and row.known <= self._reread_beyond:
        spare = min(spare, self._reread_beyond - row.total)
      self._give(row, count, plan, row.drafts[: max(0, spare)])

  def _outgrown(self, row: Row) -> bool:
    return self._reread_beyond is not None and row.known <= self._reread_beyond < row.total

  def _admit(self, plan: Plan) -> bool:
    """Lets the first waiting row run, if there is room for all its tokens. It waits while some are not known."""
    budget = self.max_tokens - plan.tokens
    if not self.waiting or not self._slots or budget < 1 or self.waiting[0].pending:
      return False
    row = self.waiting[0]
    if self._outgrown(row):
      row.keys.clear()
      row.known = len(row.tokens)
    row.update_keys(self.pages.page_size, *self._facts(row))
    held = self.pages.begin([] if row.scores else row.keys, len(row.tokens))
    if held is None:
      return False
    self.waiting.pop(0)
    bisect.insort(self.running, row, key=lambda one: one.order)
    row.held, row.slot, row.computed = held, self._take_slot(row), len(held) * self.pages.page_size
    plan.admitted.append(row)
    row.note("first_scheduled_time")
    self.prefix_queries += len(row.tokens)
    self.prefix_hits += row.computed
    row.cached = row.computed if row.cached is None else row.cached
    count = min(row.left, budget, self.max_chunk, self.pages.room(held) - row.computed)
    if count > 0:
      self._give(row, count, plan)
      self._advance(plan.work[-1])
    return True

  def _take_slot(self, row: Row) -> int:
    """One that fits, or else any."""
    slot = next((slot for slot in reversed(self._slots) if self._fits(slot, row)), self._slots[-1])
    self._slots.remove(slot)
    return slot

  def _give(self, row: Row, count: int, plan: Plan, drafts: Sequence[int] = ()) -> None:
    draws = row.draws and count == row.left
    drafts = tuple(drafts) if draws else ()
    row.drafts = ()
    count += len(drafts)
    self.pages.extend(row.held, row.computed + count)
    plan.work.append(Work(row, row.computed, count, draws, drafts))

  def _advance(self, work: Work) -> None:
    """The row as it will be when the step is done."""
    row = work.row
    row.computed += work.count
    row.pending += work.draws
    self.know(row)

  def settle(self, work: Work, accepted: int) -> None:
    """Takes back the drafts behind the first `accepted` ones. A step without drafts has nothing to take back: the next
    one is scheduled already, and what it computes counts."""
    if work.drafts and work.row.slot is not None:
      work.row.computed = work.start + work.count - len(work.drafts) + accepted

  def know(self, row: Row) -> None:
    """Names the pages whose tokens have become known."""
    row.update_keys(self.pages.page_size, *self._facts(row))
    self.pages.name(row.held, row.keys, row.computed)

  def _wait(self, row: Row) -> None:
    self._stop(row)
    bisect.insort(self.waiting, row, key=lambda one: one.order)

  def _stop(self, row: Row, spoiled: bool = False) -> None:
    self.pages.release(row.held, spoiled)
    self.running.remove(row)
    self._slots.append(row.slot)
    row.held = row.slot = None

"""The scheduler alone, with a device that is a list: every request gets what it asked for, in fair order."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.pages import Pages
from jaxllm.inference.engine.request import Request, Row
from jaxllm.inference.engine.scheduler import Scheduler
from jaxllm.inference.params import SamplingParams

SIZE = 4


def drawn(tokens):
  """The token after these, of a model that everybody can compute."""
  return sum((i + 1) * token for i, token in enumerate(tokens)) % 97


class Device:
  """Computes plans as the engine's device does: what it reads it reads from pages, `depth` steps behind the plan."""

  def __init__(self, pages, depth=1, **sizes):
    self.scheduler = Scheduler(pages, **({"max_rows": 3, "max_tokens": 8, "max_chunk": 8} | sizes))
    self.memory = {kind: {} for kind in pages.pools}
    self.texts, self.flight, self.depth = {}, [], depth
    self.live, self.done, self.plans = {}, {}, []

  def submit(self, number, prompt, count, **options):
    request = Request(tuple(prompt), SamplingParams(seed=0, max_tokens=count), **options)
    row = Row(number, request, prompt, len(prompt) + count)
    self.scheduler.add(row)
    self.live[number] = row

  def step(self):
    before, steady = self.scheduler.preemptions, self.scheduler.steady
    plan = self.scheduler.schedule()
    assert not steady or all(work.count == 1 for work in plan.work)  # there may be drafts, and room for no more
    assert not plan.admitted or self.scheduler.preemptions == before  # who was sent back does not come in again at once
    assert plan.tokens <= self.scheduler.max_tokens
    assert len({work.row.id for work in plan.work}) == len(plan.work) <= 3
    assert len({row.slot for row in self.scheduler.running}) == len(self.scheduler.running)
    for row in plan.admitted:
      self.texts[row.slot] = list(row.tokens)
    results, pages = [], self.scheduler.pages
    for work in plan.work:  # all write first
      for position in range(work.start, work.start + work.count):
        for kind, ids in work.row.held.pages.items():
          page = ids[position // SIZE]
          self.memory[kind][page, position % SIZE] = self.texts[work.row.slot][: position + 1]
    for work in plan.work:
      text = self.texts[work.row.slot]
      for position in range(work.start, work.start + work.count):
        for kind, ids in work.row.held.pages.items():
          first = 0 if kind == "global" else max(0, position - pages._window + 1)
          for seen in range(first, position + 1):
            assert self.memory[kind][ids[seen // SIZE], seen % SIZE] == text[: seen + 1], (kind, seen, position)
      if work.draws:
        assert len(text) == work.start + work.count
        results.append((work.row, drawn(text)))
        text.append(results[-1][1])
    self.plans.append(plan)
    self.flight.append(results)
    while len(self.flight) > (self.depth if plan.work else 0):
      for row, token in self.flight.pop(0):
        row.pending -= 1
        if row.finished:
          continue
        reason, _ = row.take(token)
        if reason is not None:
          self.finish(row.id)
        elif row.slot is not None:
          self.scheduler.know(row)
    return plan

  def finish(self, number):
    row = self.live.pop(number)
    self.done[number] = row.tokens
    self.scheduler.finish(row)

  def run(self, most=2000):
    for _ in range(most):
      if not self.live:
        return
      self.step()
    raise AssertionError("it does not end")


def wanted(prompt, count):
  tokens = list(prompt)
  while len(tokens) < len(prompt) + count:
    tokens.append(drawn(tokens))
  return tokens


REQUESTS = st.lists(
  st.tuples(st.integers(0, 6), st.integers(1, 18), st.integers(1, 12), st.integers(0, 1), st.integers(0, 9)),
  min_size=1,
  max_size=9,
)


@settings(max_examples=200, deadline=None)
@given(
  REQUESTS,
  st.sampled_from([None, 1, 6]),
  st.integers(0, 2),
  st.integers(8, 12),
  st.booleans(),
  st.sampled_from([None, 9]),
)
def test_nothing_is_lost_nothing_is_mixed_up_all_pages_return(requests, window, depth, pages, share, beyond):
  """A pool that is too small for what runs at once; some are aborted on the way, some restart."""
  kinds = {"global": pages} if window is None else {"global": pages, "local": 4}
  device = Device(Pages(kinds, SIZE, window=window, share=share), depth, reread_beyond=beyond)
  waits = [0] * len(requests)
  aborted = set()
  for number, (kind, length, count, priority, wait) in enumerate(requests):
    prompt = ([kind // 2] * 9 + [kind] * 9)[:length]
    for _ in range(wait):
      device.step()
    device.submit(number, prompt, count, priority=priority)
    waits[number] = wanted(prompt, count)
    if wait == 7 and device.live:
      aborted.add(victim := min(device.live))
      device.finish(victim)
    if wait == 8:
      while device.flight:
        for row, token in device.flight.pop(0):
          row.pending -= 1
          if not row.finished and row.take(token)[0] is not None:
            device.finish(row.id)
      device.scheduler.restart()
  device.run()
  assert device.done.keys() == set(range(len(requests)))
  for number, tokens in device.done.items():
    assert tokens == waits[number][: len(tokens)]
    assert number in aborted or tokens == waits[number]
  assert device.scheduler.pages.available == device.scheduler.pages.total
  assert sorted(device.scheduler._slots) == [0, 1, 2] and not device.scheduler.running


def test_a_pool_that_is_too_small_preempts_the_last_and_all_get_through():
  device = Device(Pages({"global": 7}, SIZE))
  prompts = [[i] * 6 for i in range(3)]
  for i, prompt in enumerate(prompts):
    device.submit(i, prompt, 16)
  device.run()
  assert device.scheduler.preemptions > 0
  assert [device.done[i] for i in range(3)] == [wanted(prompt, 16) for prompt in prompts]
  assert list(device.done) == [0, 1, 2]  # the first that came is never displaced


def test_prompts_are_read_beside_rows_that_draw():
  device = Device(Pages({"global": 40}, SIZE))
  device.submit(0, [1], 12)
  device.step()
  device.submit(1, [2] * 20, 2)
  parts = [[(work.row.id, work.count) for work in device.step().work] for _ in range(4)]
  assert parts == [[(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 6)], [(0, 1), (1, 1)]]


def test_rows_that_draw_do_not_wait_for_a_prompt_that_goes_before_them():
  device = Device(Pages({"global": 40}, SIZE))
  device.submit(0, [1], 12, priority=1)
  device.step()
  device.submit(1, [2] * 20, 2)
  for _ in range(4):
    assert {work.row.id: work.count for work in device.step().work}[0] == 1


def test_a_restart_computes_everything_anew():
  device = Device(Pages({"global": 40}, SIZE), depth=0)
  device.submit(0, list(range(9)), 6)
  device.step()
  device.step()
  device.scheduler.restart()
  device.submit(1, list(range(9)), 6)
  before = device.scheduler.prefix_hits
  device.step()
  assert device.scheduler.prefix_hits == before
  device.run()
  assert [device.done[i] for i in range(2)] == [wanted(range(9), 6)] * 2


def test_what_is_only_scored_draws_nothing():
  device = Device(Pages({"global": 40}, SIZE))
  row = Row(0, Request((1,) * 11, SamplingParams(seed=0)), [1] * 11, 11)
  device.scheduler.add(row)
  assert [[(work.count, work.draws) for work in device.step().work] for _ in range(3)] == [
    [(8, False)],
    [(2, False)],
    [],
  ]


def test_first_come_first_served_but_for_priority():
  device = Device(Pages({"global": 40}, SIZE), max_rows=1)
  for number, priority in enumerate([0, 0, 1, -1]):
    device.submit(number, [number + 1] * 3, 2, priority=priority)
  device.run()
  assert list(device.done) == [3, 0, 1, 2]


def test_the_completions_of_a_prompt_read_it_once():
  device = Device(Pages({"global": 40}, SIZE))
  for number in range(3):
    device.submit(number, list(range(9)), 3)
  device.run()
  assert device.scheduler.prefix_hits == 2 * 8
  assert sum(plan.tokens for plan in device.plans) == 8 + 3 * 3


def test_what_never_fits_is_refused_with_the_limit():
  device = Device(Pages({"global": 5}, SIZE))
  device.submit(0, [1] * 11, 10)  # the last token is not computed
  with pytest.raises(ConfigError, match="11 tokens and up to 11 more need 6 global pages of 4 tokens, and there are 5"):
    device.submit(1, [1] * 11, 11)
  device.run()

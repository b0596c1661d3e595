"""A plan as the arrays of a step, and a step's arrays as what each row has gained."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Int, UInt32

from jaxllm.inference.completions import Logprob
from jaxllm.inference.engine.pages import Pages
from jaxllm.inference.engine.request import probabilities
from jaxllm.inference.engine.scheduler import Plan, Work
from jaxllm.inference.engine.sizes import Shape, Sizes
from jaxllm.inference.engine.steps import DRAWS, SCORES, SHOWS, Drawn
from jaxllm.inference.logits import EVERYTHING

Shown = tuple[dict[int, Logprob], ...]

UNKNOWN = -1  # a draft that only the device knows


@dataclasses.dataclass(frozen=True)
class Arranged:
  """A plan's rows where they stand in a step; see `jaxllm.inference.engine.steps.Batch`."""

  plan: Plan
  shape: Shape
  places: list[int]  # of each work
  wishes: list[int]
  rows: Int[np.ndarray, "6 R"]
  tables: dict[str, Int[np.ndarray, "R max_pages"]]
  drafts: Int[np.ndarray, "R K"]
  allowed: UInt32[np.ndarray, "R K+1 W"] | None  # None: everything


def arrange(plan: Plan, sizes: Sizes, pages: Pages) -> Arranged:
  """The plan in the smallest shape that holds it."""
  shape = sizes.shape_for([work.count for work in plan.work], max(len(work.drafts) for work in plan.work))
  places = [work.row.slot if sizes.by_slot else i for i, work in enumerate(plan.work)]
  wishes = [_wishes(work) for work in plan.work]
  # A number that is no page's: what would be written there is dropped.
  tables = {k: np.full((shape.rows, sizes.max_pages), pool.count + 1, np.int32) for k, pool in pages.pools.items()}
  rows, drafts = np.zeros((6, shape.rows), np.int32), np.full((shape.rows, shape.drafts), UNKNOWN, np.int32)
  allowed = None
  for place, wish, work in zip(places, wishes, plan.work):
    facts = [work.row.slot, work.start, work.count, wish, len(work.drafts), work.row.known]
    rows[:, place] = np.asarray(facts)
    drafts[place, : len(work.drafts)] = work.drafts
    for kind, held in work.row.held.pages.items():
      tables[kind][place, : len(held)] = held
    guide = work.row.request.guide
    if guide is not None and work.draws:
      if allowed is None:
        allowed = np.full((shape.rows, shape.drafts + 1, len(guide.allowed)), EVERYTHING)
      allowed[place, : len(work.drafts) + 1] = guide.allowed_after(work.drafts)
  return Arranged(plan, shape, places, wishes, rows, tables, drafts, allowed)


def _wishes(work: Work) -> int:
  shows = work.draws and work.row.settings.logprobs is not None
  return DRAWS * work.draws | SHOWS * shows | SCORES * work.row.scores


@dataclasses.dataclass(frozen=True)
class Gained:
  """What a step has found for a row: `tokens` are its next ones, the drafts that held and what was drawn after them."""

  work: Work
  tokens: tuple[int, ...]
  logprobs: Shown | None
  scores: list[dict[int, Logprob]] | None  # of the tokens behind those that it read


def gained(step: Arranged, drawn: Drawn, packed: bool) -> Iterator[Gained]:
  """Waits for a step and reads it."""
  token, count = np.asarray(drawn.token), np.asarray(drawn.count)
  shown = jax.tree.map(np.asarray, drawn.logprobs) if any(wish & SHOWS for wish in step.wishes) else None
  scores = jax.tree.map(np.asarray, drawn.scores) if any(wish & SCORES for wish in step.wishes) else None
  begins = 0
  for work, place, wish in zip(step.plan.work, step.places, step.wishes):
    start = begins if packed else place * step.shape.tokens
    begins += work.count
    yield Gained(work, *_drawn(work, place, token, count, shown), _scored(work, start, scores, wish))


def _drawn(work: Work, place: int, token, count, shown) -> tuple[tuple[int, ...], Shown | None]:
  if not work.draws:
    return (), None
  tokens, wanted = tuple(int(t) for t in token[place, : count[place]]), work.row.settings.logprobs
  if wanted is None:
    return tokens, None
  return tokens, tuple(probabilities(t, shown, (place, i), wanted) for i, t in enumerate(tokens))


def _scored(work: Work, start: int, scores, wish: int) -> list[dict[int, Logprob]] | None:
  """Of the prompt's tokens behind those that the step has read; after a preemption some are known already."""
  if not wish & SCORES:
    return None
  row, found = work.row, []
  for i in range(work.count):
    position = work.start + i + 1
    if row.scored <= position < row.begins:
      found.append(probabilities(row.tokens[position], scores, start + i, row.settings.prompt_logprobs or 0))
  return found

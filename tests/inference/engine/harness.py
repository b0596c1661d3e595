"""An engine whose unwritten pages hold NaN, and serving prompts with it."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.params import SamplingParams

# Few and small programs, compiled without LLVM's optimisations, which take a third of the time.
SMALL = dict(
  max_num_seqs=3,
  page_size=4,
  max_tokens_per_step=12,
  row_buckets=(3,),
  token_buckets=(12,),
  max_logprobs=3,
  compiler_options={"xla_backend_optimization_level": 0},
)


@jax.jit
def poisoned(pages, mask):
  """NaN in the pages of the mask."""
  return jax.tree.map(lambda x: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x), pages)


class Poisoned(Engine):
  """Before each step there is NaN in every page that nobody holds or that its row has not written to yet."""

  def __init__(self, *arguments, **settings):
    super().__init__(*arguments, **(SMALL | settings))
    self.fresh = {kind: set() for kind in self._pages.pools}
    for kind, pool in self._pages.pools.items():
      pool.take = self.noting(pool.take, self.fresh[kind])

  @staticmethod
  def noting(take, fresh):
    def wrapped():
      page = take()
      fresh.add(page)
      return page

    return wrapped

  def _start(self, plan):
    masks = {}
    for kind, pool in self._pages.pools.items():
      masks[kind] = np.zeros(pool.count + 1, bool)
      masks[kind][[*pool._free, *self.fresh[kind]]] = True
      self.fresh[kind].clear()
    for name in ("layers", "draft_layers"):
      layers = [poisoned(layer, masks[layer.table]) for layer in getattr(self._state, name)]
      object.__setattr__(self._state, name, tuple(layers))
    super()._start(plan)


def greedy(prompt, count=10, **settings):
  return Request(prompt, SamplingParams(**dict(temperature=0, max_tokens=count, ignore_eos=True) | settings))


def serve(engine, requests, waits=()):
  """What each request draws; `waits`: steps that are made before each is submitted."""
  found, numbers, requests = {}, [], list(requests)
  for request, wait in zip(requests, [*waits, *[0] * len(requests)]):
    for _ in range(wait):
      collect(engine.step(), found)
    numbers.append(engine.submit(request))
  while engine.busy:
    collect(engine.step(), found)
  assert engine.stats()["pages_free"] == engine.stats()["pages_total"]
  assert all(found[number][-1].finish_reason for number in numbers)
  return [[token for delta in found[number] for token in delta.token_ids] for number in numbers]


def answers(engine, requests):
  """The last delta of each request."""
  found, numbers = {}, [engine.submit(request) for request in requests]
  while engine.busy:
    collect(engine.step(), found)
  return [found[number][-1] for number in numbers]


def collect(deltas, found):
  for delta in deltas:
    assert not found.get(delta.id) or found[delta.id][-1].finish_reason is None, "a delta after the last one"
    found.setdefault(delta.id, []).append(delta)

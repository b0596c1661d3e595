"""Several engines of one model, each on devices of its own: what one of them does, twice as often."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine.engine import Engine
from jaxllm.inference.engine.request import Delta, Request
from jaxllm.models.build import Params


class Replicas:
  """Serves as an `Engine` does; each request goes to the replica that has the fewest.

  Where a request goes changes nothing of its text, if it has a seed or draws none: only which of its beginning's pages
  are found.

  Args:
    places: the devices of each replica: one, or a mesh over which it is split.
    settings: as of `Engine`, for each.
  """

  def __init__(self, config, params: Params, *, places: Sequence[jax.Device | Mesh], **settings):
    if not places:
      raise ConfigError("there must be at least one replica")
    self._places = list(places)
    meshes = [place if isinstance(place, Mesh) else None for place in places]
    weights = [_on(params, place) for place in places]
    self._engines = [Engine(config, own, mesh=mesh, **settings) for own, mesh in zip(weights, meshes)]
    self.config, self.sizes = config, self._engines[0].sizes
    self._numbers = itertools.count()
    self._of: dict[int, tuple[int, int]] = {}  # ours: which replica, and its number there
    self._ours: dict[tuple[int, int], int] = {}

  @property
  def busy(self) -> bool:
    """Whether `step` has anything left to do or to say."""
    return any(engine.busy for engine in self._engines)

  def warm_up(self) -> None:
    """See `Engine.warm_up`."""
    for engine in self._engines:
      engine.warm_up()

  def submit(self, request: Request) -> int:
    """See `Engine.submit`."""
    which = min(range(len(self._engines)), key=lambda i: (self._load(i), i))
    there = self._engines[which].submit(request)
    number = next(self._numbers)
    self._of[number], self._ours[which, there] = (which, there), number
    return number

  def abort(self, number: int) -> Delta | None:
    """See `Engine.abort`."""
    if number not in self._of:
      return None
    which, there = self._of[number]
    last = self._engines[which].abort(there)
    return None if last is None else self._named(which, last)

  def step(self) -> list[Delta]:
    """A step of every replica that has one; each computes while the others are read."""
    return [
      self._named(which, delta) for which, engine in enumerate(self._engines) if engine.busy for delta in engine.step()
    ]

  def load_weights(self, params: Params, version: str) -> None:
    """See `Engine.load_weights`."""
    for engine, place in zip(self._engines, self._places):
      engine.load_weights(_on(params, place), version)

  def score(
    self, texts: Sequence[Sequence[int]], adapter: str | Sequence[str | None] | None = None
  ) -> list[Float32[np.ndarray, " T-1"]]:
    """See `Engine.score`; by one replica."""
    return self._engines[0].score(texts, adapter)

  def stats(self) -> dict[str, int]:
    """See `Engine.stats`; of all together."""
    each = [engine.stats() for engine in self._engines]
    return {name: sum(one[name] for one in each) for name in each[0]}

  def _load(self, which: int) -> int:
    stats = self._engines[which].stats()
    return stats["running"] + stats["waiting"]

  def _named(self, which: int, delta: Delta) -> Delta:
    number = self._ours[which, delta.id]
    if delta.finish_reason is not None:
      del self._ours[which, delta.id], self._of[number]
    return dataclasses.replace(delta, id=number)


def _on(params: Params, place: jax.Device | Mesh) -> Params:
  """The weights on this device; over a mesh the engine itself splits them."""
  return params if isinstance(place, Mesh) else jax.device_put(params, place)

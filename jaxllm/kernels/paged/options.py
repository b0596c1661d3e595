"""What a call asks for beside queries and cache, as every backend gets it."""

import dataclasses
import functools

import jax
from jaxtyping import Array, Float


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=("alibi_slopes",), meta_fields=("scale", "window", "softcap")
)
@dataclasses.dataclass(frozen=True)
class Options:
  """Sinks are no part of it: they join when the parts of a result are combined (`schedule.from_tiles`)."""

  scale: float
  window: int | None = None
  softcap: float | None = None
  alibi_slopes: Float[Array, " N"] | None = None

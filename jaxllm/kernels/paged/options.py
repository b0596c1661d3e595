"""What a call asks for beside queries and cache, as every backend gets it; and the shape of a tile."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LOWEST = -1e30  # a running maximum that is finite, so that rows without a key give zeros and not NaN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
  """group: G, query heads of a key head.

  Sinks are no part of it: they join when the parts of a result are combined (`schedule.from_tiles`).
  """

  scale: float = dataclasses.field(metadata={"static": True})
  group: int = dataclasses.field(metadata={"static": True})
  window: int | None = dataclasses.field(default=None, metadata={"static": True})
  softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
  alibi_slopes: Float[Array, " N"] | None = None


@dataclasses.dataclass(frozen=True)
class TileShape:
  """tokens: new tokens of one tile; rows: of the matrix of a key head, at least tokens * G."""

  tokens: int
  rows: int


def slope_rows(slopes: Float[Array, " N"], K: int, R: int, tokens: int) -> dict[str, Float[Array, "K R"]]:
  """ALiBi for the rows of a tile: a score gains slope * (key - first token's position) - row_bias."""
  group = slopes.shape[0] // K
  slopes = jnp.tile(slopes.astype(jnp.float32).reshape(K, 1, group), (1, tokens, 1))
  by_token = slopes * jnp.arange(tokens, dtype=jnp.float32)[:, None]
  return {
    name: jnp.pad(x.reshape(K, tokens * group), ((0, 0), (0, R - tokens * group)))
    for name, x in (("slope", slopes), ("row_bias", by_token))
  }

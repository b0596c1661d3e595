"""What an attention call asks for beside its queries, keys and values.

Shape letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which keys a query may see, apart from the arrays that say where each one stands.

  causal: keys after the query are hidden. window: so many keys up to and including the query's own
  (bidirectional: on either side, less than `window` away). sink_tokens: keys at positions below this stay
  visible past the window (arXiv 2309.17453).
  """

  causal: bool = True
  window: int | None = None
  sink_tokens: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
  """The options of one call, as every backend gets them. None: not asked for."""

  visibility: Visibility = dataclasses.field(metadata={"static": True})
  scale: float = dataclasses.field(metadata={"static": True})
  softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
  query_offset: Int[Array, " B"] | None = None
  query_segments: Int[Array, "B T"] | None = None  # both segments or neither
  key_segments: Int[Array, "B S"] | None = None
  key_positions: Int[Array, "B S"] | None = None  # only with sink_tokens; None: 0, 1, 2, ...
  prefix_lengths: Int[Array, " B"] | None = None
  alibi_slopes: Float[Array, " N"] | None = None
  sinks: Float[Array, " N"] | None = None
  bias: Float[Array, "#B N T S"] | None = None
  lse: bool = dataclasses.field(default=False, metadata={"static": True})  # whether the log-sum-exp is wanted

  @property
  def asked(self) -> frozenset[str]:
    """Names of the options that this call uses; backends refuse by name."""
    names = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None}
    names -= {"visibility", "scale", "query_segments", "key_segments", "key_positions", "lse"}
    names |= {"lse"} if self.lse else set()
    names |= {"segment_ids"} if self.query_segments is not None else set()
    v = self.visibility
    names |= {name for name in ("causal", "window", "sink_tokens") if getattr(v, name)}
    return frozenset(names)


def unfused(key: Array, value: Array, options: Options) -> str | None:
  """What none of the fused kernels for accelerators computes, or None."""
  if options.bias is not None:
    return "no bias"
  return None if value.shape[3] == key.shape[3] else "keys and values of one head dim only"


def visible(
  options: Options, query_index: Int[Array, "*q"], key_index: Int[Array, "*k"], row: dict[str, Array]
) -> Bool[Array, "..."]:
  """May a query see a key? For one row of the batch; every backend asks this function, block by block.

  Args:
    query_index, key_index: places among the keys (a query's includes `query_offset`); of shapes that
      broadcast together, such as [Q, 1] and [1, S].
    row: of the other arrays what belongs to these queries and keys, broadcasting alike: "query_segments",
      "key_segments", "key_positions", and "prefix_length" (a scalar). Those that the options leave out may be missing.
  """
  v = options.visibility
  seen: Any = True
  if v.window is not None:
    seen = (query_index - key_index < v.window) & (key_index - query_index < v.window)
    if v.sink_tokens:
      seen |= row.get("key_positions", key_index) < v.sink_tokens
  if v.causal:
    seen &= key_index <= query_index
  if options.prefix_lengths is not None:
    seen |= key_index < row["prefix_length"]
  if options.query_segments is not None:
    seen &= (row["query_segments"] == row["key_segments"]) & (row["key_segments"] != 0)
  if seen is True:
    seen = jnp.broadcast_to(True, jnp.broadcast_shapes(query_index.shape, key_index.shape))
  return seen

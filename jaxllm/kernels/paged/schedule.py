"""From sequences of any lengths to tiles of one shape, and back.

New tokens of all sequences stand back to back. A tile is up to `tokens` of them, of one sequence; the G query heads of
a key head and the tokens are the rows of one matrix (row = token * G + head), so that what is loaded of the cache is
used G * tokens times. Kernels compute tiles; the number of tiles depends on shapes only.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Where each of the T tokens belongs."""

  sequence: Int[Array, " T"]
  offset: Int[Array, " T"]  # among the new tokens of its sequence
  position: Int[Array, " T"]  # in its sequence
  real: Bool[Array, " T"]  # False: padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
  """M tiles of `tokens` tokens, and the way back from tiles to tokens."""

  sequence: Int[Array, " M"]
  first: Int[Array, " M"]  # index of the first token
  position: Int[Array, " M"]  # of the first token in its sequence
  end: Int[Array, " M"]  # keys at and after this position are seen by none of its tokens; 0: nothing to do
  token_tile: Int[Array, " T"]
  token_place: Int[Array, " T"]
  real: Bool[Array, " T"]
  tokens: int = dataclasses.field(metadata={"static": True})


def _starts(count, query_starts, num_sequences):
  """Starts without what stands after the last sequence in use."""
  last = jnp.asarray(count if num_sequences is None else num_sequences, jnp.int32)
  return query_starts[jnp.minimum(jnp.arange(count + 1), last)].astype(jnp.int32)


def tokens(
  count: int,
  kv_lengths: Int[Array, " B"],
  query_starts: Int[Array, " B+1"] | None,
  num_sequences: Int[Array, ""] | int | None,
) -> Tokens:
  """Where `count` tokens belong; without `query_starts` token b is the last of sequence b."""
  B = kv_lengths.shape[0]
  lengths, index = kv_lengths.astype(jnp.int32), jnp.arange(count)
  if query_starts is None:
    real = lengths > 0
    if num_sequences is not None:
      real &= index < num_sequences
    return Tokens(index, jnp.zeros_like(index), lengths - 1, real)
  starts = _starts(B, query_starts, num_sequences)
  sequence = jnp.clip(jnp.searchsorted(starts, index, side="right") - 1, 0, B - 1)
  offset = index - starts[sequence]
  position = lengths[sequence] - (starts[sequence + 1] - starts[sequence]) + offset
  return Tokens(sequence, offset, position, (index < starts[-1]) & (index >= starts[0]) & (position >= 0))


def plan(
  count: int,
  tile_tokens: int,
  capacity: int,
  kv_lengths: Int[Array, " B"],
  query_starts: Int[Array, " B+1"] | None,
  num_sequences: Int[Array, ""] | int | None,
) -> Schedule:
  """The tiles of `count` tokens; no more than count // tile_tokens + B of them.

  Args:
    capacity: positions that a row of the page table can name.
  """
  where = tokens(count, kv_lengths, query_starts, num_sequences)
  if query_starts is None:
    end = jnp.where(where.real, jnp.clip(where.position + 1, 0, capacity), 0)
    return Schedule(
      where.sequence, where.sequence, where.position, end, where.sequence, where.offset, where.real, tile_tokens
    )
  B = kv_lengths.shape[0]
  starts = _starts(B, query_starts, num_sequences)
  news = jnp.diff(starts)
  ends = jnp.cumsum(-(-news // tile_tokens))  # tiles up to and with each sequence
  tile = jnp.arange(min(count, count // tile_tokens + B))
  sequence = jnp.clip(jnp.searchsorted(ends, tile, side="right"), 0, B - 1)
  tiles_before = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
  offset = (tile - tiles_before[sequence]) * tile_tokens
  position = kv_lengths[sequence].astype(jnp.int32) - news[sequence] + offset
  here = jnp.clip(news[sequence] - offset, 0, tile_tokens)  # tokens of the tile
  end = jnp.where((tile < ends[-1]) & (here > 0), jnp.clip(position + here, 0, capacity), 0)
  token_tile = tiles_before[where.sequence] + where.offset // tile_tokens
  return Schedule(
    sequence,
    starts[sequence] + offset,
    position,
    end,
    jnp.clip(token_tile, 0, tile.shape[0] - 1),
    where.offset % tile_tokens,
    where.real,
    tile_tokens,
  )


def to_tiles(query: Float[Array, "T N H"], schedule: Schedule, num_kv_heads: int, rows: int) -> Float[Array, "M K R H"]:
  """Queries by tile and key head, `rows` rows each; rows of no token hold some other token's query, or zeros."""
  T, N, H = query.shape
  K = num_kv_heads
  G = N // K
  index = jnp.clip(schedule.first[:, None] + jnp.arange(schedule.tokens), 0, T - 1)
  tiles = query.reshape(T, K, G, H)[index]  # [M, tokens, K, G, H]
  tiles = tiles.transpose(0, 2, 1, 3, 4).reshape(index.shape[0], K, schedule.tokens * G, H)
  return jnp.pad(tiles, ((0, 0), (0, 0), (0, rows - schedule.tokens * G), (0, 0)))


def from_tiles(
  out: Float[Array, "P M K R H"],
  lse: Float[Array, "P M K R"],
  schedule: Schedule,
  num_heads: int,
  sinks: Float[Array, " N"] | None,
  dtype,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Each token's result from the P parts of its tile: their mean, weighted by exp(lse) of each (and of the sink).

  Rows past the tokens of a tile are ignored, and so are parts whose lse is -inf. Padding gives zeros.
  """
  parts, M, K, _, H = out.shape
  G, T = num_heads // K, schedule.real.shape[0]

  def by_token(x):
    x = x[:, :, :, : schedule.tokens * G].reshape(parts, M, K, schedule.tokens, G, *x.shape[4:])
    return x[:, schedule.token_tile, :, schedule.token_place].reshape(T, parts, num_heads, *x.shape[5:])

  out, lse = by_token(out), by_token(lse)
  real = schedule.real[:, None, None]
  lse = jnp.where(real, lse, -jnp.inf)
  every = lse if sinks is None else jnp.concatenate([lse, _sink_rows(sinks, real, T)], 1)
  total = jax.nn.logsumexp(every, axis=1)  # [T, N]
  if parts == 1 and sinks is None:
    return jnp.where(jnp.isfinite(total)[..., None], out[:, 0], 0).astype(dtype), total
  weight = jnp.exp(lse - jnp.where(jnp.isfinite(total), total, 0.0)[:, None])[..., None]
  out = jnp.where(weight > 0, out.astype(jnp.float32) * weight, 0.0).sum(1)
  return out.astype(dtype), total


def _sink_rows(sinks, real, T):
  return jnp.where(real, jnp.broadcast_to(sinks.astype(jnp.float32), (T, 1, sinks.shape[0])), -jnp.inf)

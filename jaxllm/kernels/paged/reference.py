"""Paged attention in plain JAX, block of pages by block of pages: what every other backend is measured against."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import tuning
from jaxllm.kernels.paged.options import LOWEST, Options, TileShape
from jaxllm.kernels.paged.pages import KVPages
from jaxllm.kernels.paged.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Tiles:
  """keys: of a tile at once."""

  keys: int = 256


def tile_shape(group: int, decoding: bool) -> TileShape:
  """One token a tile when decoding, else several."""
  tokens = 1 if decoding else 16
  return TileShape(tokens, tokens * group)


def forward(
  call, queries, pages: KVPages, page_table, schedule: Schedule, options: Options
) -> tuple[Float[Array, "1 M K R H"], Float[Array, "1 M K R"]]:
  """Results in float32 and log-sum-exp of all tiles; as many blocks as the longest tile has."""
  M, K, R, H = queries.shape
  size = pages.page_size
  tiles = tuning.tiles("paged_attention_xla", call.target, Tiles(), dtype=pages.keys.dtype.name)
  at_once = max(1, tiles.keys // size)
  block = at_once * size
  table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % at_once)))
  group = options.group
  token = jnp.arange(R) // group
  position = schedule.position[:, None] + token  # [M, R]
  slopes = None if options.alibi_slopes is None else options.alibi_slopes.astype(jnp.float32).reshape(1, K, group)
  slopes = None if slopes is None else jnp.tile(slopes, (1, 1, schedule.tokens))[..., None]  # [1, K, R, 1]

  def load(array, ids):
    return jnp.moveaxis(array[ids], 2, 1).reshape(M, array.shape[1], block, *array.shape[3:])

  def step(index, carry):
    acc, top, total = carry
    ids = jax.lax.dynamic_slice_in_dim(table, index * at_once, at_once, 1)[schedule.sequence]  # [M, at_once]
    place = index * block + jnp.arange(block)
    written = (place < schedule.end[:, None])[:, None, :]  # [M, 1, block]
    scores = jnp.einsum(
      "mkrh,mksh->mkrs",
      queries,
      pages.split(load(pages.keys, ids)).astype(queries.dtype),
      preferred_element_type=jnp.float32,
    )
    if pages.key_scales is not None:
      scores *= load(pages.key_scales, ids)[:, :, None].astype(jnp.float32)
    scores *= options.scale
    if options.softcap is not None:
      scores = options.softcap * jnp.tanh(scores / options.softcap)
    distance = position[:, :, None] - place  # [M, R, block]
    if slopes is not None:
      scores -= slopes * distance[:, None].astype(jnp.float32)
    seen = (distance >= 0) & written
    if options.window is not None:
      seen &= distance < options.window
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    new_top = jnp.maximum(top, scores.max(-1))
    shrink = jnp.exp(top - new_top)
    p = jnp.exp(scores - new_top[..., None])
    total = total * shrink + p.sum(-1)
    if pages.value_scales is not None:
      p *= jnp.where(written, load(pages.value_scales, ids).astype(jnp.float32), 0.0)[:, :, None]
    # Slots that nobody wrote may hold NaN, and 0 * NaN is NaN.
    value = jnp.where(written[..., None], pages.split(load(pages.values, ids)).astype(queries.dtype), 0)
    product = jnp.einsum("mkrs,mksh->mkrh", p.astype(queries.dtype), value, preferred_element_type=jnp.float32)
    return acc * shrink[..., None] + product, new_top, total

  first = jnp.int32(0)
  if options.window is not None:
    first = jnp.where(schedule.end > 0, jnp.maximum(schedule.position - options.window + 1, 0), 1 << 30).min() // block
  last = -(-schedule.end.max() // block)
  start = jnp.zeros((M, K, R, H), jnp.float32), jnp.full((M, K, R), LOWEST), jnp.zeros((M, K, R))
  acc, top, total = jax.lax.fori_loop(first, last, step, start)
  out = acc / jnp.where(total > 0, total, 1.0)[..., None]
  return out[None], (top + jnp.log(total))[None]

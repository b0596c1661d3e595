"""The paged key/value cache: its arrays, and writing new tokens into it.

A page holds `page_size` tokens of one sequence for all key heads. Its layout is [pages, K, page_size, H]: what a kernel
loads for one page and one head is a single contiguous tile whose rows are tokens, on a GPU as on a TPU. Which pages
belong to a sequence, and in which order, is its row of the page table (PagedAttention, arXiv 2309.06180).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.errors import ConfigError
from jaxllm.kernels.paged import schedule

QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # dtypes with scales, and the largest number each can hold


@functools.partial(jax.tree_util.register_dataclass)
@dataclasses.dataclass(frozen=True)
class KVPages:
  """Keys and values of all sequences, in pages.

  keys, values: [pages, K, page_size, H], float32, bfloat16, float16, int8 or float8_e4m3fn.
  key_scales, value_scales: float32 [pages, K, page_size], one for each token and head; only of the last two dtypes:
  a key is keys * key_scales.

  Several layers fit one `KVPages`: with `pages` a multiple L * P, layer l reads and writes with page_table + l * P.
  """

  keys: Array
  values: Array
  key_scales: Array | None = None
  value_scales: Array | None = None

  @classmethod
  def zeros(cls, pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype="bfloat16") -> "KVPages":
    """Empty pages; quantized dtypes get scales."""
    shape = (pages, num_kv_heads, page_size, head_dim)
    scales = [jnp.zeros(shape[:3], jnp.float32) for _ in range(2)] if jnp.dtype(dtype).name in QUANTIZED else []
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

  @property
  def page_size(self) -> int:
    return self.keys.shape[2]

  def check(self) -> None:
    """Raises ConfigError if the arrays do not belong together."""
    shape, dtype = self.keys.shape, self.keys.dtype
    scales = [None if s is None else s.shape for s in (self.key_scales, self.value_scales)]
    expected = [shape[:3] if dtype.name in QUANTIZED else None] * 2
    if len(shape) != 4 or self.values.shape != shape or self.values.dtype != dtype or scales != expected:
      raise ConfigError(
        "KVPages takes keys and values [pages, K, page_size, H] of one dtype, and scales [pages, K, page_size] if that "
        f"is one of {', '.join(QUANTIZED)}; these are {dtype} {shape}, {self.values.dtype} {self.values.shape}, "
        f"scales {scales[0]}, {scales[1]}"
      )


def write_pages(
  pages: KVPages,
  keys: Float[Array, "T K H"],
  values: Float[Array, "T K H"],
  page_table: Int[Array, "B max_pages"],
  kv_lengths: Int[Array, " B"],
  query_starts: Int[Array, " B+1"] | None = None,
  num_sequences: Int[Array, ""] | int | None = None,
) -> KVPages:
  """The pages with the keys and values of new tokens in their places; quantized if the pages are.

  Arguments as in `paged_attention`: the new tokens of a sequence are its last ones, so `kv_lengths` counts them
  already. Tokens that belong to no sequence, or that lie past the end of the page table, go nowhere. A quantized token
  has one scale for each head, its largest magnitude over the largest number of the dtype. Under a `jax.jit` that
  donates `pages` the writing is in place.

  Raises:
    ConfigError: the arrays of `pages` do not belong together.
  """
  pages.check()
  if query_starts is None and keys.shape[0] != kv_lengths.shape[0]:
    raise ConfigError(f"without query_starts every sequence has one token: {keys.shape[0]} for {kv_lengths.shape[0]}")
  count, page_size = pages.keys.shape[0], pages.page_size
  where = schedule.tokens(keys.shape[0], kv_lengths, query_starts, num_sequences)
  row = jnp.clip(where.position // page_size, 0, page_table.shape[1] - 1)
  inside = where.real & (where.position >= 0) & (where.position < page_table.shape[1] * page_size)
  page = jnp.where(inside, page_table[where.sequence, row], count)  # `count` is dropped
  slot = where.position % page_size

  def put(target, scales, new):
    if scales is None:
      return _put(target, page, slot, new.astype(target.dtype)), None
    quantized, scale = _quantize(new, target.dtype)
    return _put(target, page, slot, quantized), _put(scales, page, slot, scale.astype(scales.dtype))

  (new_keys, key_scales), (new_values, value_scales) = (
    put(pages.keys, pages.key_scales, keys),
    put(pages.values, pages.value_scales, values),
  )
  return KVPages(new_keys, new_values, key_scales, value_scales)


def _put(target, page, slot, new):
  """target[page, :, slot] = new, token by token; not for pages past the last."""

  def scatter(target, page, slot, new):
    return target.at[page, :, slot].set(new, mode="drop")

  def loop(target, page, slot, new):
    def write(t, target):
      start = jnp.minimum(page[t], target.shape[0] - 1), 0, slot[t], *(0,) * (target.ndim - 3)
      piece = new[t].reshape(1, target.shape[1], 1, *target.shape[3:])
      old = lax.dynamic_slice(target, start, piece.shape)
      return lax.dynamic_update_slice(target, jnp.where(page[t] < target.shape[0], piece, old), start)

    return lax.fori_loop(0, new.shape[0], write, target)

  if not jnp.issubdtype(target.dtype, jnp.floating) or target.dtype.itemsize > 2:
    return scatter(target, page, slot, new)
  # XLA for CPU scatters small floats by way of float32: two copies of the whole cache.
  return lax.platform_dependent(target, page, slot, new, cpu=loop, default=scatter)


def _quantize(x, dtype):
  """x is about quantized * scale, with one scale for each token and head."""
  largest = QUANTIZED[dtype.name]
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1) / largest
  scaled = x / jnp.where(scale == 0, 1.0, scale)[..., None]
  if dtype == jnp.int8:
    scaled = jnp.round(scaled)
  return jnp.clip(scaled, -largest, largest).astype(dtype), scale

"""The paged key/value cache: its arrays, and writing new tokens into it.

A page holds `page_size` tokens of one sequence for all key heads. Its layout is [pages, K, page_size, H]: what a kernel
loads for one page and one head is a single contiguous tile whose rows are tokens, on a GPU as on a TPU. Which pages
belong to a sequence, and in which order, is its row of the page table (PagedAttention, arXiv 2309.06180).

A TPU keeps arrays in tiles of 128 lanes. There pages have the layout [pages, groups, page_size, lanes], where a row is
that of 128 // H heads side by side (`lanes_of`): two heads of 64 cost neither memory nor bandwidth, where padding each
one to 128 would double both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels.backends import TARGETS
from jaxllm.kernels.paged import schedule
from jaxllm.kernels.tpu import LANES

QUANTIZED = {"int8": 127.0, "float8_e4m3fn": 448.0}  # dtypes with scales, and the largest number each can hold


def lanes_of(num_kv_heads: int, head_dim: int, target: str | None) -> tuple[int, int, int]:
  """(groups of heads, heads of a group, numbers of its row): how `target` lays out the K heads of one token.

  (K, 1, H) except on TPU, where a row is a multiple of 128: of 128 // H heads if H is at most 64, else of one. What
  heads leave of a row is zero: of 80, 96 and 192 a sixth to three eighths, of 64 nothing unless K is odd.
  """
  if target is None or TARGETS[target] != "tpu":
    return num_kv_heads, 1, head_dim
  together = min(max(1, LANES // head_dim), num_kv_heads)
  return -(-num_kv_heads // together), together, -(-together * head_dim // LANES) * LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVPages:
  """Keys and values of all sequences, in pages.

  keys, values: [pages, K, page_size, H], float32, bfloat16, float16, int8 or float8_e4m3fn; laid out for a TPU
    [pages, groups, page_size, lanes], see `lanes_of`. `split` and `join` go from one to the other.
  key_scales, value_scales: float32 [pages, K, page_size], one for each token and head; only of the last two dtypes:
    a key is keys * key_scales.
  heads: (K, H) of pages laid out for a TPU, None of others.

  Several layers fit one `KVPages`: with `pages` a multiple L * P, layer l reads and writes with page_table + l * P.
  """

  keys: Array
  values: Array
  key_scales: Array | None = None
  value_scales: Array | None = None
  heads: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})

  @classmethod
  def zeros(
    cls,
    pages: int,
    page_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype="bfloat16",
    *,
    target: str | None = None,
  ) -> "KVPages":
    """Empty pages, laid out for the chip `target`; quantized dtypes get scales.

    Every backend reads every layout but "mosaic_gpu", which takes no TPU's; "pallas_tpu" takes rows of a multiple of
    128 only, so head dims other than 128 and 256 need `target` there.
    """
    groups, together, lanes = lanes_of(num_kv_heads, head_dim, target)
    shape, scaled = (pages, groups, page_size, lanes), (pages, num_kv_heads, page_size)
    scales = [jnp.zeros(scaled, jnp.float32) if jnp.dtype(dtype).name in QUANTIZED else None for _ in range(2)]
    plain = (groups, lanes) == (num_kv_heads, head_dim)
    heads = None if plain else (num_kv_heads, head_dim)
    return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales, heads=heads)

  @property
  def page_size(self) -> int:
    return self.keys.shape[2]

  @property
  def num_kv_heads(self) -> int:
    return self.heads[0] if self.heads else self.keys.shape[1]

  @property
  def head_dim(self) -> int:
    return self.heads[1] if self.heads else self.keys.shape[3]

  @property
  def together(self) -> int:
    """Heads of a row."""
    return lanes_of(*self.heads, "tpu")[1] if self.heads else 1

  def join(self, x: Float[Array, "T K H"]) -> Float[Array, "T groups lanes"]:
    """Numbers of each head as rows of these pages."""
    if not self.heads:
      return x
    groups, lanes = self.keys.shape[1], self.keys.shape[3]
    x = jnp.pad(x, ((0, 0), (0, groups * self.together - x.shape[1]), (0, 0))).reshape(x.shape[0], groups, -1)
    return jnp.pad(x, ((0, 0), (0, 0), (0, lanes - x.shape[2])))

  def split(self, x: Float[Array, "*any groups S lanes"]) -> Float[Array, "*any K S H"]:
    """Rows of these pages by head."""
    if not self.heads:
      return x
    K, H = self.heads
    *outer, groups, S, _ = x.shape
    x = x[..., : self.together * H].reshape(*outer, groups, S, self.together, H)
    return jnp.swapaxes(x, -3, -2).reshape(*outer, groups * self.together, S, H)[..., :K, :, :]

  def check(self) -> None:
    """Raises ConfigError if the arrays do not belong together."""
    shape, dtype = self.keys.shape, self.keys.dtype
    scales = [None if s is None else s.shape for s in (self.key_scales, self.value_scales)]
    fits = len(shape) == 4 and self.values.shape == shape and self.values.dtype == dtype
    if fits and self.heads:
      groups, _, lanes = lanes_of(*self.heads, "tpu")
      fits = shape[1::2] == (groups, lanes)
    expected = [(shape[0], self.num_kv_heads, shape[2]) if dtype.name in QUANTIZED else None] * 2 if fits else None
    if scales != expected:
      raise ConfigError(
        "KVPages takes keys and values [pages, K, page_size, H] of one dtype, or as `lanes_of` heads lays them out for "
        f"a TPU, and scales [pages, K, page_size] if that is one of {', '.join(QUANTIZED)}; these are {dtype} {shape}, "
        f"{self.values.dtype} {self.values.shape}, heads {self.heads}, scales {scales[0]}, {scales[1]}"
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
    ConfigError: arrays that do not belong together.
  """
  pages.check()
  if keys.shape[1:] != (pages.num_kv_heads, pages.head_dim) or values.shape != keys.shape:
    raise ConfigError(
      f"write_pages takes keys and values [T, {pages.num_kv_heads}, {pages.head_dim}]; these are {keys.shape}, "
      f"{values.shape}"
    )
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
      return _put(target, page, slot, pages.join(new.astype(target.dtype))), None
    quantized, scale = _quantize(new, target.dtype)
    return _put(target, page, slot, pages.join(quantized)), _put(scales, page, slot, scale.astype(scales.dtype))

  (new_keys, key_scales), (new_values, value_scales) = (
    put(pages.keys, pages.key_scales, keys),
    put(pages.values, pages.value_scales, values),
  )
  return dataclasses.replace(pages, keys=new_keys, values=new_values, key_scales=key_scales, value_scales=value_scales)


def _put(target, page, slot, new):
  """target[page, :, slot] = new, token by token; not for pages past the last."""

  def scatter(target, page, slot, new):
    # Heads are named one by one: a slice of them makes XLA for TPU turn 8-bit pages around, two copies of the cache.
    heads = jnp.arange(target.shape[1])
    return target.at[page[:, None], heads, slot[:, None]].set(new, mode="drop")

  def loop(target, page, slot, new):
    inside = page < target.shape[0]
    some = jnp.argmax(inside)

    def write(t, target):
      # One that goes nowhere writes another one again: to put back what is there, XLA would copy the whole cache.
      t = jnp.where(inside[t], t, some)
      start = page[t], 0, slot[t], *(0,) * (target.ndim - 3)
      return lax.dynamic_update_slice(target, new[t].reshape(1, target.shape[1], 1, *target.shape[3:]), start)

    return lax.fori_loop(0, jnp.where(inside[some], new.shape[0], 0), write, target)

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

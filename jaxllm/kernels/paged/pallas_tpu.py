"""Paged attention for TPU: pages are copied to vector memory one step ahead of the arithmetic, across tiles too.

The grid walks over tiles. Tables and lengths are scalars that are there before the kernel starts, so that each step
asks for the pages of the next one, be it of the same tile or the first of the next (as in Ragged Paged Attention,
arXiv 2604.15464). A page comes with all its key heads in one contiguous copy; each head's queries, G times the tokens
of the tile, are one matrix. int8 and fp8 pages are widened in registers; scales multiply scores and probabilities.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxllm.kernels.backends import TARGETS
from jaxllm.kernels.paged.options import Options, TileShape, slope_rows
from jaxllm.kernels.paged.pages import KVPages
from jaxllm.kernels.paged.schedule import Schedule

LANES = 128
LOWEST = -1e30  # a running maximum that is finite, so that rows without a key give zeros and not NaN


@dataclasses.dataclass(frozen=True)
class Tiles:
  """block: keys of one step, all heads; a multiple of 128 and of the page size. vmem: bytes a kernel may take."""

  block: int
  vmem: int


def _tiles(num_kv_heads: int, head_dim: int, itemsize: int, page_size: int, target: str | None) -> Tiles:
  """About 1 MiB of keys a step: copies long enough to hide their start, and room for two steps of keys and values."""
  unit = max(page_size, LANES)
  token = num_kv_heads * max(head_dim, LANES) * itemsize
  block = min(max((1 << 20) // token // unit, 1) * unit, max(512, unit))
  return Tiles(block, {"v5e": 64 << 20, "v6e": 64 << 20, "v5p": 48 << 20, "v7": 48 << 20}.get(target or "", 15 << 20))


def tile_shape(group: int, decoding: bool) -> TileShape:
  """Tokens and rows of a tile: as many as the matrix unit is wide, or one token of each sequence."""
  tokens = 1 if decoding else max(1, 128 // group)
  return TileShape(tokens, -(-tokens * group // 16) * 16)


def refuses(query: Array, pages: KVPages, options: Options, target: str | None) -> str | None:
  """Why this backend cannot compute the call, or None."""
  del options
  if target is not None and TARGETS[target] != "tpu":
    return f"a kernel for TPU, not {target}"
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"queries in bfloat16 or float32, not {query.dtype}"
  size, quantized = pages.page_size, pages.key_scales is not None
  if not quantized and pages.keys.dtype != query.dtype:
    return f"pages of the queries' dtype, int8 or float8_e4m3fn, not {pages.keys.dtype}"
  smallest = LANES if quantized else 16
  if size % smallest or (size < LANES and LANES % size):
    return f"pages of a multiple of {smallest} tokens (below 128: a power of two), not {size}"
  if query.shape[2] % LANES:
    return f"head dims of a multiple of {LANES}, not {query.shape[2]}"
  if not (query.size and pages.keys.size):
    return "no queries or no pages"
  return None


def attend(
  queries: Float[Array, "M K R H"],
  pages: KVPages,
  page_table: Int[Array, "B max_pages"],
  schedule: Schedule,
  options: Options,
  *,
  target: str | None = None,
  splits: int | None = None,
  tiles: Tiles | None = None,
) -> tuple[Float[Array, "1 M K R H"], Float[Array, "1 M K R"]]:
  """Results and log-sum-exp of all tiles, in one part: a core walks over its tiles one by one."""
  del splits
  M, K, R, H = queries.shape
  size, max_pages = pages.page_size, page_table.shape[1]
  tiles = tiles or _tiles(K, H, pages.keys.dtype.itemsize, size, target)
  block, cores = tiles.block, 2 if target in ("v4", "v5p") and M % 2 == 0 else 1  # v4 and v5p: two cores, one device
  scalars = [page_table.reshape(-1), schedule.sequence, schedule.position, jnp.maximum(schedule.end, 1)]
  inputs: dict[str, Array | None] = {"query": queries, "keys": pages.keys, "values": pages.values}
  buffer = pltpu.VMEM((2, K, block, H), pages.keys.dtype)
  scratch = {"keys_vmem": buffer, "values_vmem": buffer}
  if pages.key_scales is not None:
    inputs |= {"key_scales": pages.key_scales, "value_scales": pages.value_scales}
    scratch |= {f"{name}_vmem": pltpu.VMEM((2, K, block), jnp.float32) for name in ("key_scales", "value_scales")}
  copied = [name.removesuffix("_vmem") for name in scratch]
  if options.alibi_slopes is not None:
    rows = slope_rows(options.alibi_slopes, K, R, schedule.tokens)
    inputs |= {name: jnp.broadcast_to(x[..., None], (K, R, LANES)) for name, x in rows.items()}
  scratch |= {
    "acc": pltpu.VMEM((K, R, H), jnp.float32),
    "top": pltpu.VMEM((K, R, LANES), jnp.float32),
    "total": pltpu.VMEM((K, R, LANES), jnp.float32),
    "arrived": pltpu.SemaphoreType.DMA((2, len(copied))),
    "slot": pltpu.SMEM((1,), jnp.int32),
  }

  def spec(name, array):
    if name in copied:
      return pl.BlockSpec(memory_space=pltpu.HBM)
    if name == "query":
      return pl.BlockSpec((None, K, R, H), lambda core, i, *_: (core * (M // cores) + i, 0, 0, 0))
    return pl.BlockSpec(array.shape, lambda *_: (0, 0, 0))

  keys = M * max_pages * size
  cost = pl.CostEstimate(
    flops=4 * keys * K * R * H,
    transcendentals=keys * K * R,
    bytes_accessed=2 * keys * K * H * pages.keys.dtype.itemsize + 2 * queries.size * queries.dtype.itemsize,
  )
  out, lse = pl.pallas_call(
    functools.partial(_kernel, options, block, size, max_pages, M // cores, copied, (tuple(inputs), tuple(scratch))),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(cores, M // cores),
      in_specs=[spec(name, array) for name, array in inputs.items()],
      out_specs=[
        pl.BlockSpec((None, K, R, H), lambda core, i, *_: (core * (M // cores) + i, 0, 0, 0)),
        pl.BlockSpec((None, K, R), lambda core, i, *_: (core * (M // cores) + i, 0, 0)),
      ],
      scratch_shapes=list(scratch.values()),
    ),
    out_shape=[
      jax.ShapeDtypeStruct(queries.shape, queries.dtype),
      jax.ShapeDtypeStruct((M, K, R), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem),
    cost_estimate=cost,
    name="paged_attention",
  )(*scalars, *inputs.values())
  return out[None], lse[None]


def _kernel(options, block, size, max_pages, per_core, copied, names, table, sequences, positions, ends, *refs):
  """One tile: all its heads, block of keys by block of keys."""
  refs = dict(zip((*names[0], "out", "lse", *names[1]), refs, strict=True))
  slot_ref, pages = refs["slot"], block // size
  step_of_core = pl.program_id(1)
  tile = pl.program_id(0) * per_core + step_of_core

  def first_block(tile):
    if options.window is None:
      return 0
    return lax.div(jnp.maximum(positions[tile] - (options.window - 1), 0), jnp.int32(block))

  def copies(tile, index, slot, act):
    """Starts or awaits the copies of one block's pages, those that hold keys."""
    for i in range(pages):
      page = index * pages + i

      @pl.when(page * size < ends[tile])
      def _(i=i, page=page):
        row = table[sequences[tile] * max_pages + page]
        for n, name in enumerate(copied):
          buffer = refs[f"{name}_vmem"].at[slot, :, pl.ds(i * size, size)]
          act(pltpu.make_async_copy(refs[name].at[row], buffer, refs["arrived"].at[slot, n]))

  def start(tile, index, slot):
    copies(tile, index, slot, lambda copy: copy.start())

  @pl.when(step_of_core == 0)
  def _():
    slot_ref[0] = 0
    start(tile, first_block(tile), 0)

  refs["acc"][...] = jnp.zeros_like(refs["acc"])
  refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
  refs["total"][...] = jnp.zeros_like(refs["total"])
  first = first_block(tile)
  last = pl.cdiv(ends[tile], block)

  def step(index, _):
    slot = slot_ref[0]

    @pl.when(index + 1 < last)
    def _():
      start(tile, index + 1, 1 - slot)

    @pl.when((index + 1 == last) & (step_of_core + 1 < per_core))
    def _():
      start(tile + 1, first_block(tile + 1), 1 - slot)

    copies(tile, index, slot, lambda copy: copy.wait())
    _attend_block(options, refs, slot, index * block, positions[tile], ends[tile])
    slot_ref[0] = 1 - slot

  lax.fori_loop(first, last, step, None)
  for k in range(refs["acc"].shape[0]):
    total = refs["total"][k]
    share = 1.0 / jnp.where(total > 0, total, 1.0)
    refs["out"][k] = (refs["acc"][k] * share[:, :1]).astype(refs["out"].dtype)
    refs["lse"][k] = (refs["top"][k] + jnp.log(total))[:, 0]


def _attend_block(options, refs, slot, start, position, end):
  """The running softmax of every head goes on by one block, whose first key is at `start`."""
  keys, values, query = refs["keys_vmem"], refs["values_vmem"], refs["query"]
  K, R, H = query.shape
  block, dtype = keys.shape[2], query.dtype
  precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
  # Row r is token r // G, at position + r // G: compared without dividing.
  row = lax.broadcasted_iota(jnp.int32, (R, block), 0)
  ahead = lax.broadcasted_iota(jnp.int32, (R, block), 1) + (start - position)
  seen = ahead * options.group <= row
  if options.window is not None:
    seen &= row < (ahead + options.window) * options.group
  written = lax.broadcasted_iota(jnp.int32, (1, block), 1) < end - start

  if "key_scales" not in refs:

    @pl.when(start + block > end)  # slots that no token was written to: 0 times NaN would be NaN
    def _():
      for k in range(K):
        held = lax.broadcasted_iota(jnp.int32, (block, H), 0) < end - start
        values[slot, k] = jnp.where(held, values[slot, k].astype(jnp.float32), 0.0).astype(values.dtype)

  for k in range(K):
    scores = lax.dot_general(
      query[k],
      keys[slot, k].astype(dtype),
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
      precision=precision,
    )
    if "key_scales" in refs:
      scores *= refs["key_scales_vmem"][slot, k : k + 1]
    scores *= options.scale
    if options.softcap is not None:
      scores = options.softcap * jnp.tanh(scores * (1 / options.softcap))
    if options.alibi_slopes is not None:
      scores += refs["slope"][k][:, :1] * ahead.astype(jnp.float32) - refs["row_bias"][k][:, :1]
    scores = jnp.where(seen, scores, -jnp.inf)
    top = refs["top"][k]
    new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
    shrink = jnp.exp(top - new_top)
    p = jnp.exp(scores - new_top[:, :1])
    refs["total"][k] = refs["total"][k] * shrink + p.sum(axis=1, keepdims=True)
    refs["top"][k] = new_top
    value = values[slot, k].astype(dtype)
    if "value_scales" in refs:
      p *= jnp.where(written, refs["value_scales_vmem"][slot, k : k + 1], 0.0)
      if not jnp.issubdtype(values.dtype, jnp.integer):  # integers are finite, whoever wrote them
        held = lax.broadcasted_iota(jnp.int32, (block, H), 0) < end - start
        value = jnp.where(held, value.astype(jnp.float32), 0.0).astype(dtype)
    product = lax.dot(p.astype(dtype), value, preferred_element_type=jnp.float32, precision=precision)
    refs["acc"][k] = refs["acc"][k] * shrink[:, :1] + product

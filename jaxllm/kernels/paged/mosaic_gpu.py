"""Paged attention for Hopper in Mosaic GPU.

A block computes one tile of one key head, over one of `splits` equal ranges of the tile's keys. One warpgroup does
nothing but look up pages and ask the copy engine (TMA) for them, `stages` blocks of keys ahead; the others multiply
(wgmma) and keep a running softmax each.

- Decoding, a tile has G rows (of 64 that wgmma computes) and time goes into reading the cache. The computing
  warpgroups take the blocks of keys in turns, so that one's softmax overlaps with the other's products; each leaves a
  part of its own, which is combined with the parts of the other ranges (`schedule.from_tiles`).
- With longer pieces of sequences a tile has 128 rows, 64 for each computing warpgroup, and both read every block.

int8 pages are copied as they are. Keys meet queries of 15 bits, in two products of 8 bits (`integers.split`); values
a computing warpgroup widens to 16 bits through its registers, which is exact. The scales multiply scores and
probabilities, which are smaller than keys and values.

Nothing here has run on a GPU: results are proved in jax's emulator, the machine code by compiling ahead of time.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import tuning
from jaxllm.kernels.hopper import (
  COLUMN,
  LARGEST_GRID,
  LOG2E,
  MULTIPROCESSORS,
  ROW,
  ROWS,
  SHARED_MEMORY,
  WGMMA,
  swizzled,
)
from jaxllm.kernels.integers import split, split_scale
from jaxllm.kernels.paged.options import LOWEST, Options, TileShape, slope_rows
from jaxllm.kernels.paged.pages import KVPages
from jaxllm.kernels.paged.schedule import Schedule

OUT_COLUMNS = 64  # results leave so many at a time


@dataclasses.dataclass(frozen=True)
class Tiles:
  """block: keys of one step; stages: steps that are loaded ahead; warpgroups: computing ones.

  Where warpgroups take turns, `stages` is a multiple of their number: a warpgroup that waits on a barrier must wait for
  each of its phases, because hardware tells it only whether an odd or an even number of them is over.
  """

  block: int = 64
  stages: int = 4
  warpgroups: int = 2


def _tiles(head_dim: int, rows: int, quantized: bool) -> Tiles:
  """64 keys a step, or 128 where the products are what takes time; and as many stages as shared memory holds."""
  block = 128 if rows > ROWS and head_dim <= 128 and not quantized else 64
  fixed = 2 * rows * head_dim + 2 * ROWS * (OUT_COLUMNS + 1) * 4
  stage = 2 * block * head_dim * 2
  if quantized:
    fixed += 2 * block * head_dim * 2
    stage = 2 * block * (head_dim + 4)
  stages = min(8, (SHARED_MEMORY - 4096 - fixed) // stage)
  return Tiles(block, stages if rows > ROWS else stages // 2 * 2)


def tile_shape(group: int, decoding: bool) -> TileShape:
  """Tokens and rows of a tile; 64 rows are computed by warpgroups in turns, 128 by two at once."""
  if decoding and group <= ROWS:
    return TileShape(1, ROWS)
  return TileShape(max(1, 2 * ROWS // group), 2 * ROWS)


def refuses(call, query: Array, pages: KVPages, options: Options) -> str | None:
  """Why this backend cannot compute the call, or None."""
  if pages.heads:
    return "pages laid out for a TPU"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"queries in bfloat16 or float16, not {query.dtype}"
  if pages.keys.dtype not in (query.dtype, jnp.int8):
    return f"pages of the queries' dtype or int8, not {pages.keys.dtype}"
  if query.shape[2] not in (64, 128, 192, 256):
    return f"head dims 64, 128, 192 and 256, not {query.shape[2]}"
  smallest = 32 if pages.keys.dtype == jnp.int8 else 16
  if pages.page_size not in (16, 32, 64) and pages.page_size % 128 or pages.page_size < smallest:
    return f"pages of {smallest} to 64 tokens, a power of two, or of a multiple of 128, not {pages.page_size}"
  if query.shape[1] // pages.keys.shape[1] > 2 * ROWS:
    return f"up to {2 * ROWS} query heads for a key head, not {query.shape[1] // pages.keys.shape[1]}"
  if not (query.size and pages.keys.size):
    return "no queries or no pages"
  return None


def default_splits(tiles: int, num_kv_heads: int, rows: int, capacity: int) -> int:
  """Ranges of keys: enough blocks that uneven lengths even out over the chip, none of less than 512 keys."""
  enough = MULTIPROCESSORS * (8 if rows <= ROWS else 4)
  return max(1, min(pl.cdiv(enough, tiles * num_kv_heads), capacity // 512))


def forward(
  call, queries, pages: KVPages, page_table, schedule: Schedule, options: Options
) -> tuple[Float[Array, "P M K rows H"], Float[Array, "P M K R"]]:
  """Results and log-sum-exp of every part of every tile; `rows` are the first ones, which hold tokens."""
  M, K, R, H = queries.shape
  quantized, shared = pages.key_scales is not None, R > ROWS
  facts = {"head_dim": H, "rows": R, "dtype": pages.keys.dtype.name}
  tiles = tuning.tiles("paged_attention", call.target, _tiles(H, R, quantized), **facts)
  warpgroups, block, stages = tiles.warpgroups, tiles.block, tiles.stages
  if shared and warpgroups * ROWS != R:
    raise ValueError(f"a tile of {R} rows takes {R // ROWS} warpgroups, not {warpgroups}")
  if M > LARGEST_GRID:
    raise ConfigError(f"paged_attention on Hopper takes up to {LARGEST_GRID} tiles at once, not {M}: give fewer tokens")
  if not shared and stages % warpgroups:
    raise ValueError(f"{warpgroups} warpgroups in turns take a multiple of {warpgroups} stages, not {stages}")
  splits = call.options or default_splits(M, K, R, page_table.shape[1] * pages.page_size)
  parts = splits if shared else splits * warpgroups
  out_dtype = queries.dtype if parts == 1 else jnp.float32
  rows = min(R, pl.cdiv(schedule.tokens * options.group, 8) * 8) if not shared else R

  inputs: dict[str, Array | None] = {
    "query": queries,
    "keys": pages.keys,
    "values": pages.values,
    "table": page_table,
    "work": jnp.stack([schedule.sequence, schedule.position, schedule.end], 1).astype(jnp.int32),
  }
  copies = max(1, block // pages.page_size)  # of one step
  scratch = {
    "query_smem": plgpu.SMEM((R // ROWS, ROWS, H), queries.dtype, transforms=_tiled(H, queries.dtype)),
    "key_smem": plgpu.SMEM((stages, block, H), pages.keys.dtype, transforms=_tiled(H, pages.keys.dtype)),
    "value_smem": plgpu.SMEM((stages, block, H), pages.keys.dtype, transforms=_tiled(H, pages.keys.dtype)),
    "out_smem": plgpu.SMEM((warpgroups, ROWS, OUT_COLUMNS), out_dtype, transforms=_tiled(OUT_COLUMNS, out_dtype)),
    "lse_smem": plgpu.SMEM((warpgroups, ROWS), jnp.float32),
    "counting_smem": plgpu.SMEM((warpgroups, block), jnp.int32),
    "query_ready": plgpu.Barrier(num_barriers=warpgroups),
    "key_ready": plgpu.Barrier(num_arrivals=copies * (1 + quantized), num_barriers=stages),
    "value_ready": plgpu.Barrier(num_arrivals=copies * (1 + quantized), num_barriers=stages),
    "key_done": plgpu.Barrier(num_arrivals=warpgroups if shared else 1, num_barriers=stages),
    "value_done": plgpu.Barrier(num_arrivals=warpgroups if shared else 1, num_barriers=stages),
  }
  if quantized:
    both, largest = split(queries.reshape(M, K, R // ROWS, ROWS, H))
    inputs["query"] = jnp.moveaxis(both, 0, 3).reshape(M, K, 2 * R, H)  # both of a warpgroup's rows together
    largest = largest.reshape(M, K, R)
    inputs |= {"query_largest": largest, "key_scales": pages.key_scales, "value_scales": pages.value_scales}
    scratch |= {
      "query_smem": plgpu.SMEM((R // ROWS, 2 * ROWS, H), jnp.int8, transforms=_tiled(H, jnp.int8)),
      "query_scale_smem": plgpu.SMEM((warpgroups, ROWS), jnp.float32),
      "wide_smem": plgpu.SMEM((warpgroups, block, H), queries.dtype, transforms=_tiled(H, queries.dtype)),
      "key_scale_smem": plgpu.SMEM((stages, block), jnp.float32),
      "value_scale_smem": plgpu.SMEM((stages, block), jnp.float32),
    }
  elif shared:
    scratch["cleaned"] = plgpu.Barrier(num_arrivals=warpgroups)
  if options.alibi_slopes is not None:
    scratch["slope_smem"] = plgpu.SMEM((warpgroups, ROWS), jnp.float32)
    inputs["slope"] = slope_rows(options.alibi_slopes, K, R, schedule.tokens)["slope"]
  return plgpu.kernel(
    functools.partial(_kernel, options, tiles, tuple(inputs), (splits, pages.page_size, shared)),
    out_type=(
      jax.ShapeDtypeStruct((parts, M, K, rows, H), out_dtype),
      jax.ShapeDtypeStruct((parts, M, K, R), jnp.float32),
    ),
    scratch_types=scratch,
    grid=(M, splits, K),  # the last runs fastest: heads of one page lie side by side
    grid_names=("tile", "split", "head"),
    num_threads=warpgroups + 1,
    thread_name="warpgroup",
    kernel_name="paged_attention",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs.values())


def _tiled(columns, dtype):
  return swizzled(columns, dtype, 64 if jnp.dtype(dtype).itemsize == 1 else None)  # int8 is read 64 columns at a time


def _kernel(options, tiles, names, static, *refs, **scratch):
  """One tile, range of keys and head: the last warpgroup copies, the others compute."""
  splits, page_size, shared = static
  gmem = dict(zip((*names, "out", "lse"), refs, strict=True))
  tile, split, head, warpgroup = (lax.axis_index(name) for name in ("tile", "split", "head", "warpgroup"))

  def span():
    """First step and number of steps. For each role of its own: values from before the branch cost spills."""
    of_role = lax.optimization_barrier(tile)
    sequence, position, end = (gmem["work"][of_role, i] for i in range(3))
    first = 0
    if options.window is not None:
      first = lax.div(jnp.maximum(position - (options.window - 1), 0), jnp.int32(tiles.block))
    last = pl.cdiv(end, jnp.int32(tiles.block))
    each = pl.cdiv(jnp.maximum(last - first, 0), jnp.int32(splits))
    first += split * each
    return sequence, position, end, first, jnp.clip(last - first, 0, each)

  @pl.when(warpgroup < tiles.warpgroups)
  def _():
    plgpu.set_max_registers(240, action="increase")
    _, position, end, first, count = span()
    _compute(options, tiles, shared, gmem, (tile, split, head, warpgroup, position, end), first, count, **scratch)

  @pl.when(warpgroup == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(24, action="decrease")
    sequence, _, end, first, count = span()
    _copy(tiles, page_size, gmem, (sequence, head, end), first, count, **scratch)


def _copy(tiles, page_size, gmem, place, first, count, **scratch):
  """Keys and values of every step, each into its slot once all who read the slot are done with it."""
  sequence, head, end = place
  last_page = lax.div(end - 1, jnp.int32(page_size))
  piece = min(page_size, tiles.block)

  @pl.loop(0, count)
  def _(step):
    slot = lax.rem(step, jnp.int32(tiles.stages))
    sources = []
    for i in range(tiles.block // piece):
      start = (first + step) * tiles.block + i * piece
      # Past the last page comes the last page again: it is in the second-level cache, and nobody looks at it.
      page = jnp.minimum(lax.div(start, jnp.int32(page_size)), last_page)
      sources.append((gmem["table"][sequence, page], pl.ds(lax.rem(start, jnp.int32(page_size)), piece)))
    for name, array in (("key", "keys"), ("value", "values")):
      ready = scratch[f"{name}_ready"].at[slot]
      plgpu.barrier_wait(scratch[f"{name}_done"].at[slot])
      for i, (page, rows) in enumerate(sources):
        target = slot, pl.ds(i * piece, piece)
        plgpu.copy_gmem_to_smem(gmem[array].at[page, head, rows], scratch[f"{name}_smem"].at[target], ready)
        if f"{name}_scales" in gmem:
          scales = gmem[f"{name}_scales"].at[page, head, rows]
          plgpu.copy_gmem_to_smem(scales, scratch[f"{name}_scale_smem"].at[target], ready)


def _compute(options, tiles, shared, gmem, place, first, count, **scratch):
  """The rows of one warpgroup, from their queries to their results."""
  group = options.group
  tile, split, head, warpgroup, position, end = place
  quantized = "key_scales" in gmem
  block, dtype = tiles.block, scratch["wide_smem" if quantized else "query_smem"].dtype
  H = scratch["query_smem"].shape[-1]
  key_ready, value_ready = scratch["key_ready"], scratch["value_ready"]
  key_done, value_done = scratch["key_done"], scratch["value_done"]
  row_start = warpgroup * ROWS if shared else 0  # of this warpgroup among the tile's rows
  query_smem = scratch["query_smem"].at[warpgroup if shared else 0]
  scores_shape = (ROWS, block)
  # Places among keys are counted from the tile's first token.
  before, written = first * block - position, end - position

  @pl.when(jnp.bool_(True) if shared else warpgroup == 0)
  def _():
    for slot in range(tiles.stages):
      plgpu.barrier_arrive(key_done.at[slot])
      plgpu.barrier_arrive(value_done.at[slot])

  def over(rows, shape):
    return lax.broadcast_in_dim(rows, shape, [0])

  def mine(name):
    """This warpgroup's own part, for use in the loop: without the barrier the compiler works addresses out before the
    loop and keeps them in registers that the products need."""
    return scratch[name].at[lax.optimization_barrier(warpgroup)]

  # What would not change from step to step comes from shared memory for the same reason.
  scratch["counting_smem"].at[warpgroup][...] = plgpu.layout_cast(lax.iota(jnp.int32, block), COLUMN)
  rows = pl.ds(row_start, ROWS)
  if options.alibi_slopes is not None:
    slopes = plgpu.load(gmem["slope"].at[head, rows], layout=ROW, optimized=False)
    scratch["slope_smem"].at[warpgroup][...] = slopes
  if quantized:
    largest = plgpu.load(gmem["query_largest"].at[tile, head, rows], layout=ROW, optimized=False)
    # Not 0: what is hidden stays hidden from a query of zeros.
    scratch["query_scale_smem"].at[warpgroup][...] = jnp.maximum(split_scale(largest), 1e-30)
  plgpu.commit_smem()

  def places(start, dtype):
    """Of the token that a row belongs to (in decoding there is one only), and of the key."""
    keys = plgpu.load(mine("counting_smem"), layout=COLUMN) + start
    keys = lax.broadcast_in_dim(keys.astype(dtype), scores_shape, [1])
    if not shared:
      return dtype(0), keys
    rows = plgpu.layout_cast(lax.iota(jnp.int32, ROWS), ROW) + row_start
    return over(lax.div(rows, jnp.int32(group)).astype(dtype), scores_shape), keys

  def mask(values, start):
    token, key = places(start, jnp.int32)
    seen = key <= token
    if options.window is not None:
      seen &= token < key + options.window
    return jnp.where(seen, values, -jnp.inf)

  def logits(raw, start):
    """Scores, and the factor, of all or of each row, that they still lack to be in base 2."""
    scale = options.scale
    if quantized:
      scale *= plgpu.load(mine("query_scale_smem"), layout=ROW)
    if options.softcap is None and options.alibi_slopes is None and options.scale > 0:
      return raw, scale * LOG2E
    values = raw * (over(scale, scores_shape) if quantized else scale)
    if options.softcap is not None:  # tanh by exp2: the chip's own tanh keeps 11 bits only
      values = options.softcap - 2 * options.softcap / (1 + jnp.exp2(values * (2 * LOG2E / options.softcap)))
    if options.alibi_slopes is not None:
      token, key = places(start, jnp.float32)
      values += over(plgpu.load(mine("slope_smem"), layout=ROW), scores_shape) * (key - token)
    return values, LOG2E

  def widen(narrow_ref):
    """A block of int8 as 16 bits in this warpgroup's buffer."""
    wide = mine("wide_smem")
    for column in range(0, H, 64):
      here = slice(None), pl.ds(column, 64)
      narrow = plgpu.load(narrow_ref.at[here], layout=plgpu.Layout.WGMMA_UPCAST_2X)
      wide[here] = narrow.astype(dtype)
      plgpu.commit_smem()  # after each chunk: loads of the next one do not move up and take registers
    return wide

  def clean(value_ref, start):
    """Zeros in the slots after `end`: a probability of 0 times NaN would be NaN."""
    for r in range(0, block, ROWS):
      for c in range(0, H, 64):
        part = value_ref.at[pl.ds(r, ROWS), pl.ds(c, 64)]
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, 64), 0, layout=WGMMA)
        values = plgpu.load(part, layout=WGMMA)
        part[...] = jnp.where(row < written - start - r, values, jnp.zeros_like(values))
        plgpu.commit_smem()  # after each piece: loads of the next ones do not move up and take registers

  def step(turn, carry):
    acc, top, total = carry
    index = turn if shared else turn * tiles.warpgroups + warpgroup
    slot, start = lax.rem(index, jnp.int32(tiles.stages)), before + index * block

    plgpu.barrier_wait(key_ready.at[slot])
    keys = scratch["key_smem"].at[slot]
    queries = mine("query_smem") if shared else query_smem

    def score(acc_ref):
      plgpu.wgmma(acc_ref, queries.at[pl.ds(0, ROWS)], keys.T)
      if quantized:
        acc_ref[...] = acc_ref[...] * 256
        plgpu.wgmma(acc_ref, queries.at[pl.ds(ROWS, ROWS)], keys.T)
      return acc_ref[...]

    raw = pl.run_scoped(score, plgpu.ACC(scores_shape, jnp.int32 if quantized else jnp.float32))
    if quantized:
      key_scales = plgpu.load(scratch["key_scale_smem"].at[slot], layout=COLUMN)
      plgpu.commit_smem()  # what was read by loads is next written by a copy
      raw = raw.astype(jnp.float32) * lax.broadcast_in_dim(key_scales, scores_shape, [1])
    plgpu.barrier_arrive(key_done.at[slot])
    values, factor = logits(raw, start)
    partly = start + block > row_start // group + 1
    if options.window is not None:
      partly |= start + options.window <= (row_start + ROWS - 1) // group
    values = lax.cond(partly, lambda: mask(values, start), lambda: values)

    new_top = jnp.maximum(top, values.max(axis=1) * factor)
    shrink = jnp.exp2(top - new_top)
    factor = factor if isinstance(factor, float) else over(factor, scores_shape)
    p = jnp.exp2(values * factor - over(new_top, scores_shape))
    acc *= over(shrink, acc.shape)
    total = total * shrink + p.sum(axis=1)

    plgpu.barrier_wait(value_ready.at[slot])
    values_ref = scratch["value_smem"].at[slot]
    if quantized:
      value_scales = plgpu.load(scratch["value_scale_smem"].at[slot], layout=COLUMN)
      finite = jnp.abs(value_scales) < float(jnp.finfo(jnp.float32).max)  # not so in slots that were never written
      p *= lax.broadcast_in_dim(jnp.where(finite, value_scales, 0.0), scores_shape, [1])
    # Before the values are touched: 16 bits of a probability take half the registers.
    acc, total, p16 = lax.optimization_barrier((acc, total, p.astype(dtype)))
    if quantized:
      values_ref = widen(values_ref)
      plgpu.barrier_arrive(value_done.at[slot])
    else:

      @pl.when(start + block > written)
      def _():
        if shared:  # one cleans for all who read
          pl.when(warpgroup == 0)(lambda: clean(values_ref, start))
          plgpu.barrier_arrive(scratch["cleaned"])
          plgpu.barrier_wait(scratch["cleaned"])
        else:
          clean(values_ref, start)

    acc = pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, p16, values_ref))(plgpu.ACC.init(acc))
    if not quantized:
      plgpu.barrier_arrive(value_done.at[slot])
    return acc, new_top, total

  ready = scratch["query_ready"].at[warpgroup if shared else 0]

  @pl.when(jnp.bool_(True) if shared else warpgroup == 0)
  def _():
    size = query_smem.shape[0]
    mine = pl.ds(warpgroup * size if shared else 0, size)
    plgpu.copy_gmem_to_smem(gmem["query"].at[tile, head, mine], query_smem, ready)

  plgpu.barrier_wait(ready)

  turns = count if shared else lax.div(count - warpgroup + (tiles.warpgroups - 1), jnp.int32(tiles.warpgroups))
  acc, top, total = lax.fori_loop(
    0,
    turns,
    step,
    (
      plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), WGMMA),
      plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW),
      plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), ROW),
    ),
  )

  # Asked for again: kept, they would spill.
  tile, split, head, warpgroup = (lax.axis_index(name) for name in ("tile", "split", "head", "warpgroup"))
  row_start = warpgroup * ROWS if shared else 0
  acc *= over(1.0 / jnp.where(total > 0, total, 1.0), acc.shape)
  lse_smem, out_smem = scratch["lse_smem"].at[warpgroup], scratch["out_smem"].at[warpgroup]
  lse_smem[...] = (top + jnp.log2(total)) * math.log(2)
  part = split if shared else split * tiles.warpgroups + warpgroup
  rows = min(ROWS, gmem["out"].shape[3])
  for column in range(0, H, OUT_COLUMNS):
    out_smem[...] = acc[:, column : column + OUT_COLUMNS].astype(out_smem.dtype)
    plgpu.commit_smem()
    out = gmem["out"].at[part, tile, head, pl.ds(row_start, rows), pl.ds(column, OUT_COLUMNS)]
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out)
    if column == 0:
      plgpu.copy_smem_to_gmem(lse_smem, gmem["lse"].at[part, tile, head, pl.ds(row_start, ROWS)])
    plgpu.wait_smem_to_gmem(0)

"""`grouped_matmul` for Hopper in Mosaic GPU: a persistent block on every multiprocessor that walks over tiles.

One warpgroup asks the copy engine (TMA) for operands, `stages` steps ahead and across the tiles' borders; two others
multiply (wgmma), 64 rows of the tile each. A tile belongs to one group. It starts at the group's first row, rounded
down to 8 rows because operands lie in shared memory in groups of 8: fewer tiles than a fixed cut of the rows needs,
where every border inside a tile costs a visit more. Rows that are another group's are multiplied and not stored; as a
copy has a fixed size, a tile that is not full leaves in up to six, of 32, 16, ... 1 rows (the way of jax's
`ragged_dot_mgpu`). Rows of no group are tiles of zeros, without a product.

The weights' gradient contracts rows: steps of 64 from the group's first row, rounded down; in the first and the last
the others' rows are overwritten with zeros in shared memory, of both operands, because NaN times zero is NaN.

Nothing here has run on a GPU: results are proved in jax's emulator, the machine code by compiling ahead of time. Not
measured, so open: tiles, stages and the order of tiles, clusters that share a copy, the swizzle of partial stores.
"""

import dataclasses
import functools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.kernels import tuning
from jaxllm.kernels.grouped import varying
from jaxllm.kernels.hopper import MULTIPROCESSORS, ROWS, TILED, WGMMA


@dataclasses.dataclass(frozen=True)
class Tiles:
  """A block's tile is 2 * 64 rows (of the gradient: of a matrix) by `columns`, summed up in steps of 64.

  stages: steps in flight. strip: tiles of rows that are finished for all columns before the next ones, so that what
  they read stays in the second-level cache. blocks: multiprocessors.
  """

  columns: int = 256
  stages: int = 4
  strip: int = 16
  blocks: int = MULTIPROCESSORS


def _tiles(columns: int) -> Tiles:
  """What fits 227 KiB of shared memory and 64 Ki registers without spills, for so many columns of the result."""
  narrow = -(-columns // 128) * 128 < -(-columns // 256) * 256
  return Tiles(columns=128, stages=6) if narrow else Tiles()


def refuses(call, x: Array, weights: Array) -> str | None:
  """Why this backend cannot compute the call, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 or float16, not {x.dtype}"
  if any(size % 64 for size in weights.shape[1:]):
    return f"matrices of multiples of 64, not {weights.shape[1:]}"
  return None


# ---------------------------------------------------------------- which tiles


def row_tiles(sizes: Int[Array, " E"], M: int, rows: int) -> tuple[Int[Array, "T 4"], Int[Array, " 1"]]:
  """(group, first row, low, high) of each tile, of whose rows [low, high) are the group's, and the number of tiles.

  First rows are multiples of 8. Rows of no group are those of group E. Past the number of tiles the table holds
  anything; it is as long as it can ever need to be.
  """
  E = sizes.shape[0]
  ends = jnp.append(jnp.minimum(jnp.cumsum(sizes), M), M).astype(jnp.int32)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
  first = starts // 8 * 8
  count = jnp.where(ends > starts, (ends - first + rows - 1) // rows, 0)
  last = jnp.cumsum(count)
  tile = jnp.arange((M + 7 * (E + 1)) // rows + E + 1)
  group = jnp.minimum(jnp.searchsorted(last, tile, side="right", method="compare_all"), E)
  row = first[group] + (tile - (last - count)[group]) * rows
  low, high = jnp.maximum(starts[group] - row, 0), jnp.minimum(ends[group] - row, rows)
  return jnp.stack([group, row, low, high], axis=1).astype(jnp.int32), last[-1:].astype(jnp.int32)


def _place(index, down, across, strip):
  """(tile of rows, tile of columns) of the index-th of down * across tiles."""
  before = lax.div(index, strip * across) * strip
  width = jnp.minimum(strip, down - before)
  index -= before * across
  return before + lax.rem(index, width), lax.div(index, width)


def _whole_tiles(x, rows):
  """`x` with rows up to a tile, and a multiple of 8, which the copies need."""
  extra = max(-x.shape[0] % 8, rows - x.shape[0])
  return jnp.pad(x, [(0, extra), (0, 0)]) if extra else x


def _call(kernel, name, tiles, operands, out, smem):
  """One persistent kernel of two warpgroups that multiply and one that copies."""
  blocks = functools.partial(plgpu.SMEM, dtype=out.dtype)
  stages = tiles.stages
  result = plgpu.kernel(
    kernel,
    out_type=out,
    scratch_types={
      "left": blocks((stages, 2, *smem[0]), transforms=TILED),
      "right": blocks((stages, *smem[1]), transforms=TILED),
      "whole": blocks((2, ROWS, 64), transforms=TILED),
      "parts": blocks((2, ROWS, 64)),
      "ready": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
      "done": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      "both": plgpu.Barrier(num_arrivals=2),
    },
    grid=(tiles.blocks,),
    grid_names=("block",),
    num_threads=3,
    thread_name="warpgroup",
    kernel_name=name,
  )(*operands)
  return varying.alike(result, *operands)[0]  # whatever `out` says, it comes back as the same on every device


def _roles(tiles, total, copy, compute, done):
  """Runs copy(index, step) or compute(index, step, warpgroup) for each of this block's tiles; both return the step
  that comes next, and the operands of a step go through slot step % stages."""
  block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
  mine = lax.div(total - block + (tiles.blocks - 1), jnp.int32(tiles.blocks))

  def walk(role):
    lax.fori_loop(0, mine, lambda i, step: role(block + i * tiles.blocks, step), jnp.int32(0))

  @pl.when(warpgroup == 2)
  def _():
    plgpu.set_max_registers(40, action="decrease")
    walk(copy)

  @pl.when(warpgroup < 2)
  def _():
    plgpu.set_max_registers(232, action="increase")
    for slot in range(tiles.stages):  # all slots are free
      plgpu.barrier_arrive(done.at[slot])
    walk(lambda index, step: compute(index, step, warpgroup))
    plgpu.wait_smem_to_gmem(0)


def _multiply(acc, tiles, step, count, ready, done, operands, before=None):
  """Adds `count` steps' products to `acc`; a slot is handed back once the product that reads it is over."""

  @pl.loop(0, count)
  def _(k):
    slot = lax.rem(step + k, jnp.int32(tiles.stages))
    plgpu.barrier_wait(ready.at[slot])
    if before is not None:
      before(k, slot)
    plgpu.wgmma(acc, *operands(slot))
    plgpu.wgmma_wait(1)

    @pl.when(k > 0)
    def _():
      plgpu.barrier_arrive(done.at[lax.rem(step + k - 1, jnp.int32(tiles.stages))])

  plgpu.wgmma_wait(0)

  @pl.when(count > 0)
  def _():
    plgpu.barrier_arrive(done.at[lax.rem(step + count - 1, jnp.int32(tiles.stages))])


def _store(value, whole, out, rows, column):
  """A warpgroup's 64 rows of the result, 64 columns at a time."""
  for start in range(0, value.shape[1], 64):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    whole[...] = value[:, start : start + 64]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(whole, out.at[rows, pl.ds(column + start, 64)])


def _store_part(value, parts, out, row, column, low, high):
  """Of a warpgroup's 64 rows of the result those in [low, high)."""
  for start in range(0, value.shape[1], 64):
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    parts[...] = value[:, start : start + 64]
    plgpu.commit_smem()
    at, columns = low, pl.ds(column + start, 64)
    for size in (32, 16, 8, 4, 2, 1):
      rest = (high - low) & size

      @pl.when(rest != 0)
      def _(at=at, size=size, columns=columns):
        plgpu.copy_smem_to_gmem(parts.at[pl.ds(at, size)], out.at[pl.ds(row + at, size), columns])

      at += rest


# ---------------------------------------------------------------- the product


def forward(call, x, weights, sizes, transposed=False) -> Float[Array, "M N"]:
  """Rows times their group's matrix."""
  M, N = x.shape[0], weights.shape[1 if transposed else 2]
  t = tuning.tiles("grouped_matmul", call.target, _tiles(N), columns=N)
  x = _whole_tiles(x, 2 * ROWS)
  table, count = row_tiles(sizes, x.shape[0], 2 * ROWS)
  out = varying.result((x.shape[0], N), x.dtype, x)
  right = (t.columns, 64) if transposed else (64, t.columns)
  kernel = functools.partial(_product_kernel, t, transposed)
  return _call(kernel, "grouped_matmul", t, (table, count, x, weights), out, ((ROWS, 64), right))[:M]


def _product_kernel(t, transposed, table, count, x, weights, out, *, left, right, whole, parts, ready, done, both):
  E, steps, across = weights.shape[0], x.shape[1] // 64, -(-out.shape[1] // t.columns)
  tiles = count[0]

  def place(index):
    """(group, first row, low, high) of the index-th tile, its first column, and its number of steps."""
    tile, column = _place(index, tiles, across, t.strip)
    group, row, low, high = (table[tile, i] for i in range(4))
    return group, pl.multiple_of(row, 8), low, high, column * t.columns, jnp.where(group < E, steps, 0)

  def copy(index, step):
    group, row, _, _, column, steps = place(index)

    @pl.loop(0, steps)
    def _(k):
      slot = lax.rem(step + k, jnp.int32(t.stages))
      plgpu.barrier_wait(done.at[slot])
      inner, columns = pl.ds(k * 64, 64), pl.ds(column, t.columns)
      for half in range(2):
        rows = pl.ds(row + half * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.at[rows, inner], left.at[slot, half], ready.at[slot])
      matrix = weights.at[group, columns, inner] if transposed else weights.at[group, inner, columns]
      plgpu.copy_gmem_to_smem(matrix, right.at[slot], ready.at[slot])

    return step + steps

  def compute(index, step, warpgroup):
    _, row, low, high, column, steps = place(index)
    low, high = jnp.maximum(low - warpgroup * ROWS, 0), jnp.minimum(high - warpgroup * ROWS, ROWS)
    row += warpgroup * ROWS

    @pl.when(high > low)
    def _():
      def operands(slot):
        matrix = right.at[slot]
        return left.at[slot, warpgroup], matrix.T if transposed else matrix

      def sums(acc):
        _multiply(acc, t, step, steps, ready, done, operands)
        return acc[...]

      value = pl.run_scoped(sums, plgpu.ACC((ROWS, t.columns))).astype(out.dtype)
      full = high - low == ROWS
      pl.when(full)(lambda: _store(value, whole.at[warpgroup], out, pl.ds(row, ROWS), column))
      pl.when(~full)(lambda: _store_part(value, parts.at[warpgroup], out, row, column, low, high))

    @pl.when(high <= low)
    def _():  # no row here is the group's: keep in step
      @pl.loop(0, steps)
      def _(k):
        slot = lax.rem(step + k, jnp.int32(t.stages))
        plgpu.barrier_wait(ready.at[slot])
        plgpu.barrier_arrive(done.at[slot])

    return step + steps

  _roles(t, tiles * across, copy, compute, done)


# ---------------------------------------------------------------- the weights' gradient


def backward(call, x, dy, sizes, dtype) -> Float[Array, "E D F"]:
  """Of each group's matrix, summed in float32, rounded once to x's dtype and returned in `dtype`."""
  t = tuning.tiles("grouped_gradient", call.target, _tiles(dy.shape[1]), columns=dy.shape[1])
  M = x.shape[0]
  ends = jnp.minimum(jnp.cumsum(sizes), M).astype(jnp.int32)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
  x, dy = _whole_tiles(x, 2 * ROWS), _whole_tiles(dy, 2 * ROWS)
  out = varying.result((sizes.shape[0], x.shape[1], dy.shape[1]), x.dtype, x)
  operands = jnp.stack([starts, ends], axis=1), x, dy
  kernel = functools.partial(_gradient_kernel, t)
  shapes = (64, ROWS), (64, t.columns)
  return _call(kernel, "grouped_matmul_weights_gradient", t, operands, out, shapes).astype(dtype)


def _gradient_kernel(t, bounds, x, dy, out, *, left, right, whole, parts, ready, done, both):
  E, D, F = out.shape
  down, across = -(-D // (2 * ROWS)), -(-F // t.columns)

  def place(index):
    """(group, its first and last row, first row of the matrix, first column, first row to read, number of steps)."""
    group = lax.div(index, down * across)
    tile, column = _place(index - group * (down * across), down, across, t.strip)
    start, end = bounds[group, 0], bounds[group, 1]
    first = pl.multiple_of(lax.div(start, 8) * 8, 8)
    steps = jnp.where(end > start, lax.div(end - first + 63, 64), 0)
    return group, start, end, tile * (2 * ROWS), column * t.columns, first, steps

  def copy(index, step):
    _, _, _, row, column, first, steps = place(index)

    @pl.loop(0, steps)
    def _(k):
      slot = lax.rem(step + k, jnp.int32(t.stages))
      plgpu.barrier_wait(done.at[slot])
      inner = pl.ds(first + k * 64, 64)
      for half in range(2):
        rows = pl.ds(row + half * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.at[inner, rows], left.at[slot, half], ready.at[slot])
      plgpu.copy_gmem_to_smem(dy.at[inner, pl.ds(column, t.columns)], right.at[slot], ready.at[slot])

    return step + steps

  def compute(index, step, warpgroup):
    group, start, end, row, column, first, steps = place(index)

    def clear(ref, low, high):
      """Zeros outside of rows [low, high)."""
      value = plgpu.load(ref, layout=WGMMA, optimized=False)
      at = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=WGMMA)
      zero = plgpu.layout_cast(jnp.zeros(ref.shape, ref.dtype), WGMMA)
      ref[...] = jnp.where((at >= low) & (at < high), value, zero)

    def clean(k, slot):
      low, high = start - (first + k * 64), end - (first + k * 64)

      @pl.when((low > 0) | (high < 64))
      def _():  # each warpgroup its own columns of x and half of dy's
        clear(left.at[slot, warpgroup], low, high)
        for half in range(2):

          @pl.when(warpgroup == half)
          def _(half=half):
            clear(right.at[slot, :, pl.ds(half * (t.columns // 2), t.columns // 2)], low, high)

        plgpu.commit_smem()
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

    def sums(acc):
      operands = lambda slot: (left.at[slot, warpgroup].T, right.at[slot])  # noqa: E731
      _multiply(acc, t, step, steps, ready, done, operands, clean)
      return acc[...]

    value = pl.run_scoped(sums, plgpu.ACC((ROWS, t.columns))).astype(out.dtype)
    rows = pl.ds(row + warpgroup * ROWS, ROWS)
    _store(value, whole.at[warpgroup], out.at[group], rows, column)
    return step + steps

  _roles(t, E * down * across, copy, compute, done)

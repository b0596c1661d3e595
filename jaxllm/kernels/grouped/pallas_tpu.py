"""`grouped_matmul` on TPUs: tiles of rows, each visited once for every group that has rows in it.

The visits are listed before the kernel starts, so the copies of a visit's rows and matrix run ahead. A tile that groups
share stays where it is while they take turns, and each writes its own rows (the idea of MegaBlocks, arXiv 2211.15841,
and of jax's megablox). Of such a tile only the parts of `Tiles.part` rows that hold some of the group's are multiplied;
with many small groups that is most of the work saved. Rows of no group are visited as one more group, for their zeros.
"""

import dataclasses
import functools
import itertools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxllm.kernels import tuning
from jaxllm.kernels.grouped import varying
from jaxllm.kernels.tpu import LANES, dot

# TFLOP/s in bfloat16 and TB/s of a core, MiB of vector memory that a kernel may take, and the matrix unit's side
CHIPS = {
  "v4": (137.5, 0.615, 14, 128),
  "v5e": (197, 0.82, 64, 128),
  "v5p": (229.5, 1.23, 48, 128),
  "v6e": (920, 1.64, 64, 256),
  "v7": (1155, 3.7, 48, 256),
}


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of one visit.

  rows: of x. part: of them, multiplied or skipped together; divides rows. inner, columns: of the group's matrix (for
  its gradient: columns of x and of dy); inner divides the contracted length.
  """

  rows: int
  inner: int
  columns: int
  part: int


def refuses(call, x: Array, weights: Array) -> str | None:
  """Why this backend cannot compute the call, or None."""
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    return f"float32 or bfloat16, not {x.dtype}"
  E, D, F = weights.shape
  if not all(_candidates(x.shape[0], E, K, N, x.dtype.itemsize, call.target) for K, N in ((D, F), (F, D))):
    return f"a row of {max(D, F)} does not divide into parts of {LANES} and is too long for vector memory"
  return None


# ---------------------------------------------------------------- tiles


def _chip(target):
  """(TFLOP/s, TB/s, bytes of vector memory, side of the matrix unit)."""
  flops, bandwidth, memory, side = CHIPS.get(target or "", CHIPS["v4"])
  return flops, bandwidth, memory << 20, side


def _divisors(n):
  """Multiples of 128 that divide n, and n itself."""
  return [size for size in range(LANES, n, LANES) if n % size == 0] + [n]


def _fits(rows, inner, columns, itemsize, target):
  """Whether [rows, inner] times [inner, columns] fits the vector memory, twice, and compiles to code that is finite:
  products are unrolled. Six passes make a float32 one, of operands split into three."""
  operands, result = rows * inner + inner * columns, rows * columns
  used = 2 * itemsize * (operands + result) + 8 * result + (6 * operands if itemsize == 4 else 0)
  return used <= _chip(target)[2] * 7 // 8 and rows * inner * columns <= 1 << (28 if itemsize == 4 else 30)


def _candidates(M, E, K, N, itemsize, target):
  """The tiles that fit, for rows [M, K] times [E, K, N]."""
  found = []
  for rows, columns in itertools.product((128, 256, 512, 1024), (256, 512, 1024, 2048)):
    rows, columns = min(rows, M), min(columns, N)
    part = LANES if rows % LANES == 0 else rows
    for inner in _divisors(K):
      if _fits(rows, inner, columns, itemsize, target):
        found.append(Tiles(rows, inner, columns, part))
  return found


def _seconds(tiles, M, E, K, N, itemsize, target):
  """Estimated time: of the multiplications or of the copies, whichever is longer, and of starting the visits.

  An estimate to rank tiles by, not measured. The matrix unit takes in part of a matrix while it multiplies rows by the
  part before, which few rows do not hide.
  """
  flops, bandwidth, _, side = _chip(target)
  visits, across, along = M / tiles.rows + E, -(-N // tiles.columns), K // tiles.inner
  work = 2 * (M + E * tiles.part) * K * N / (flops * 1e12) * (6 if itemsize == 4 else 1) * (1 + side / 2 / tiles.rows)
  matrices = E if along == 1 else visits  # a matrix in one part stays while the visits are for its group
  moved = itemsize * (across * visits * tiles.rows * K + matrices * K * N + M * N)
  return max(work, moved / (bandwidth * 1e12)) + 0.35e-6 * visits * across * along


def _tiles(M, E, K, N, dtype, target) -> Tiles:
  """For rows [M, K] times [E, K, N]: by estimate, the fastest that fit."""
  size = jnp.dtype(dtype).itemsize
  return min(_candidates(M, E, K, N, size, target), key=lambda tiles: _seconds(tiles, M, E, K, N, size, target))


def _gradient_tiles(M, E, D, F, dtype, target) -> Tiles:
  """For the gradient [E, D, F]: rows are contracted, so few of them suffice; a large block of the result reads x and
  dy least often."""
  rows = min(M, 512 if M // E >= 256 else 256)
  blocks = [(min(d, D), min(f, F)) for d, f in itertools.product((256, 512, 1024, 2048), repeat=2)]
  fitting = [(d, f) for d, f in blocks if _fits(d, rows, f, jnp.dtype(dtype).itemsize, target)]
  d, f = min(fitting, key=lambda block: -(-F // block[1]) * D + -(-D // block[0]) * F)
  return Tiles(rows, d, f, LANES if rows % LANES == 0 else rows)


# ---------------------------------------------------------------- visits


def _visits(sizes: Int[Array, " E"], M: int, rows: int, empty: bool) -> tuple[Array, ...]:
  """(group, tile of rows) of each visit, the groups' first and last rows, and the number of visits.

  The lists are as long as they can ever need to be; past the number of visits they repeat the last one. Rows of no
  group are those of group E, visited unless `empty`: then groups without rows are, once each, instead.
  """
  E, tiles = sizes.shape[0], -(-M // rows)
  ends = jnp.minimum(jnp.cumsum(sizes), M).astype(jnp.int32)
  ends = ends if empty else jnp.append(ends, M)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
  first = jnp.minimum(starts // rows, tiles - 1)
  count = jnp.where(ends > starts, (ends - 1) // rows - first + 1, int(empty))
  last = jnp.cumsum(count)
  visit = jnp.minimum(jnp.arange(tiles + E), last[-1] - 1)
  group = jnp.searchsorted(last, visit, side="right", method="compare_all").astype(jnp.int32)
  tile = first[group] + visit - (last - count)[group]
  return group, tile.astype(jnp.int32), starts, ends, last[-1:].astype(jnp.int32)


def _range(group, tile, starts, ends, rows, at):
  """Rows [low, high) of the visited tile that are the group's."""
  base = tile[at] * rows
  return starts[group[at]] - base, ends[group[at]] - base


def _parts(t, low, high):
  """The parts of a tile that hold rows from [low, high)."""
  low, high = jnp.maximum(low, 0), jnp.minimum(high, t.rows)
  return lax.div(low, t.part), jnp.where(high > low, lax.div(high + (t.part - 1), t.part), 0)


def _params(target, semantics):
  memory = _chip(target)[2] if target in CHIPS else None
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=memory)


# ---------------------------------------------------------------- the product


def forward(call, x, weights, sizes, transposed=False) -> Float[Array, "M N"]:
  """Rows times their group's matrix."""
  (M, K), E, N = x.shape, weights.shape[0], weights.shape[1 if transposed else 2]
  chosen = _tiles(M, E, K, N, x.dtype, call.target)
  t = tuning.tiles("grouped_matmul", call.target, chosen, inner=K, columns=N)
  visits = _visits(sizes, M, t.rows, empty=False)
  steps = K // t.inner

  def inner(at, k, group, total):  # a visit that reads nothing stays where the one before ended
    return jnp.where((at < total[0]) & (group[at] < E), k, steps - 1)

  def x_block(n, at, k, group, tile, starts, ends, total):
    return tile[at], inner(at, k, group, total)

  def matrix_block(n, at, k, group, tile, starts, ends, total):
    k = inner(at, k, group, total)
    return (jnp.minimum(group[at], E - 1), n, k) if transposed else (jnp.minimum(group[at], E - 1), k, n)

  def out_block(n, at, k, group, tile, *rest):
    return tile[at], n

  matrix = (None, t.columns, t.inner) if transposed else (None, t.inner, t.columns)
  bytes_read = x.nbytes * -(-N // t.columns) + weights.nbytes
  return pl.pallas_call(
    functools.partial(_product_kernel, t, E, steps, 1 if transposed else 0),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(visits),
      grid=(-(-N // t.columns), visits[0].shape[0], steps),
      in_specs=[pl.BlockSpec((t.rows, t.inner), x_block), pl.BlockSpec(matrix, matrix_block)],
      out_specs=pl.BlockSpec((t.rows, t.columns), out_block),
      scratch_shapes=[pltpu.VMEM((t.rows, t.columns), jnp.float32)] if steps > 1 else [],
    ),
    out_shape=varying.result((M, N), x.dtype, x),
    compiler_params=_params(call.target, ("parallel", "arbitrary", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=2 * M * K * N, transcendentals=0, bytes_accessed=bytes_read + M * N * x.dtype.itemsize
    ),
    name="grouped_matmul",
  )(*visits, x, weights)


def _product_kernel(t, E, steps, matrix_axis, group, tile, starts, ends, total, x, matrix, out, *acc):
  at, k = pl.program_id(1), pl.program_id(2)
  low, high = _range(group, tile, starts, ends, t.rows, at)
  live, real, final = at < total[0], group[at] < E, k == steps - 1

  def multiply(part):
    """Adds these rows' products up, and after the last of them writes those rows that are the group's."""
    value = dot(x[part], matrix[...], (1, matrix_axis))
    if not acc:
      return store(part, value)
    total_so_far = acc[0]

    @pl.when(k == 0)
    def _():
      total_so_far[part] = value

    @pl.when((k > 0) & ~final)
    def _():
      total_so_far[part] += value

    @pl.when(final)
    def _():
      store(part, total_so_far[part] + value)

  def store(part, value):
    row = lax.broadcasted_iota(jnp.int32, (part.size, t.columns), 0) + part.start
    out[part] = jnp.where((row >= low) & (row < high), value.astype(out.dtype), out[part])

  whole = live & real & (low <= 0) & (high >= t.rows)
  pl.when(whole)(lambda: multiply(pl.ds(0, t.rows)))

  @pl.when(live & ~whole)
  def _():
    @pl.loop(*_parts(t, low, high))
    def _(index):
      part = pl.ds(pl.multiple_of(index * t.part, t.part), t.part)
      pl.when(real)(lambda: multiply(part))
      pl.when(~real & final)(lambda: store(part, jnp.zeros((t.part, t.columns), jnp.float32)))


# ---------------------------------------------------------------- the weights' gradient


def backward(call, x, dy, sizes, dtype) -> Float[Array, "E D F"]:
  """Of each group's matrix, summed in float32, rounded once to x's dtype and returned in `dtype`."""
  (M, D), F, E = x.shape, dy.shape[1], sizes.shape[0]
  t = _gradient_tiles(M, E, D, F, x.dtype, call.target)
  t = tuning.tiles("grouped_gradient", call.target, t, inner=D, columns=F)
  visits = _visits(sizes, M, t.rows, empty=True)
  across, down = -(-F // t.columns), -(-D // t.inner)
  out = varying.result((E, D, F), x.dtype, x)
  return pl.pallas_call(
    functools.partial(_gradient_kernel, t),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(visits),
      grid=(down, across, visits[0].shape[0]),
      in_specs=[
        pl.BlockSpec((t.rows, t.inner), lambda d, f, at, group, tile, *rest: (tile[at], d)),
        pl.BlockSpec((t.rows, t.columns), lambda d, f, at, group, tile, *rest: (tile[at], f)),
      ],
      out_specs=pl.BlockSpec((None, t.inner, t.columns), lambda d, f, at, group, *rest: (group[at], d, f)),
      scratch_shapes=[pltpu.VMEM((t.inner, t.columns), jnp.float32)],
    ),
    out_shape=out,
    compiler_params=_params(call.target, ("parallel", "parallel", "arbitrary")),
    cost_estimate=pl.CostEstimate(
      flops=2 * M * D * F,
      transcendentals=0,
      bytes_accessed=x.nbytes * across + dy.nbytes * down + out.size * x.dtype.itemsize,
    ),
    name="grouped_matmul_weights_gradient",
  )(*visits, x, dy).astype(dtype)


def _gradient_kernel(t, group, tile, starts, ends, total, x, dy, out, acc):
  at = pl.program_id(2)
  low, high = _range(group, tile, starts, ends, t.rows, at)
  live = at < total[0]
  first = (at == 0) | (group[jnp.maximum(at - 1, 0)] != group[at])
  last = (at == total[0] - 1) | (group[jnp.minimum(at + 1, pl.num_programs(2) - 1)] != group[at])

  @pl.when(live & first)
  def _():
    acc[...] = jnp.zeros_like(acc)

  whole = live & (low <= 0) & (high >= t.rows)

  @pl.when(whole)
  def _():
    acc[...] += dot(x[...], dy[...], (0, 0))

  def multiply(part):
    def own(ref):  # both: another group's NaN times zero would be NaN
      row = lax.broadcasted_iota(jnp.int32, (part.size, ref.shape[1]), 0) + part.start
      return jnp.where((row >= low) & (row < high), ref[part], jnp.zeros((), ref.dtype))

    acc[...] += dot(own(x), own(dy), (0, 0))

  @pl.when(live & ~whole)
  def _():
    @pl.loop(*_parts(t, low, high))
    def _(index):
      multiply(pl.ds(pl.multiple_of(index * t.part, t.part), t.part))

  @pl.when(live & last)
  def _():
    out[...] = acc[...].astype(out.dtype)

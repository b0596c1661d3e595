"""Products on TPUs: a tile of codes becomes a dense tile in vector memory, which the matrix unit multiplies.

A tile's codes are unpacked and scaled 128 columns at a time, the width of a vector register, into a scratch tile; one
product of the whole tile follows. Scales of output features multiply the sums instead (forward) or the incoming
gradient (backward), and dynamic formats multiply their codes as they are. Group scales arrive as rows [group, feature]
and are turned once for each tile, because a weight row is a row of codes.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxllm.kernels import tuning
from jaxllm.kernels.quantized import reference
from jaxllm.kernels.quantized.weights import HALF, NF4, QuantizedWeight

LANES = 128
VMEM_LIMIT = 48 << 20  # bytes; the smallest vector memory of a supported chip is 64 MiB


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Tokens, output features and input features of a tile."""

  tokens: int
  features: int
  inputs: int


def _tiles(M: int, weight: QuantizedWeight) -> Tiles:
  """Wide enough that a tile's product takes as long as its copies and its unpacking; not measured on a chip."""
  few = M <= 64
  limit = 2048 if few else 1024
  step = 2 * HALF if weight.packed else HALF
  inputs = max(n for n in range(step, limit + 1, step) if weight.padded_features % n == 0 and _fits(weight, n))
  return Tiles(min(M, 1024), min(512 if few else 1024, -(-weight.shape[-1] // LANES) * LANES), inputs)


def _fits(weight, inputs):
  size = weight.group_size
  return size is None or inputs % size == 0 or size % inputs == 0


def refuses(call, x: jax.Array, weight: QuantizedWeight) -> str | None:
  """Why these kernels cannot compute the call, or None."""
  size = weight.group_size
  if size not in (None, 32, 64, 128) and size % (2 * HALF):
    return f"groups of 32, 64, 128 or a multiple of 256, not {size}"
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"bfloat16 or float32 activations only, not {x.dtype}"
  if call.target == "v4":
    return "8-bit and 4-bit tiles need a TPU v5 or later"
  return None


def forward(call, x: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """x [M, D] W -> [M, F]."""
  M, F, dtype = x.shape[0], weight.shape[-1], x.dtype
  facts = {"format": weight.format, "tokens": min(M, 1024), "in_features": weight.in_features}
  t = tuning.tiles("quantized_matmul", call.target, _tiles(M, weight), **facts)
  x_scale = []
  if weight.dynamic:
    x, scale = reference.quantize_rows(x, weight.values.dtype)
    x_scale = [scale[:, None]]
  x = jnp.pad(x, ((0, 0), (0, weight.padded_features - x.shape[1])))
  grid = (pl.cdiv(M, t.tokens), pl.cdiv(F, t.features), x.shape[1] // t.inputs)
  total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  scales, in_columns = _scales(weight, t.inputs)

  def kernel(x_ref, w_ref, *refs):
    scale_refs, x_scale_ref = refs[: len(scales)], refs[len(scales) : len(scales) + len(x_scale)]
    out_ref, acc, *dense = refs[len(scales) + len(x_scale) :]
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)

    if weight.dynamic:
      w = w_ref[...]
    else:
      _unpack(weight, w_ref, scale_refs if in_columns else (), dense[0])
      w = dense[0][...]
    acc[...] += lax.dot_general(
      x_ref[...], w, (((1,), (1,)), ((), ())), preferred_element_type=total, precision=_precision(dtype)
    )

    @pl.when(k == grid[2] - 1)
    def _():
      y = acc[...].astype(jnp.float32)
      if not in_columns:
        y *= scale_refs[0][0, :1]
      if x_scale_ref:
        y *= x_scale_ref[0][...]
      out_ref[...] = y.astype(out_ref.dtype)

  columns = t.inputs // (2 if weight.packed else 1)
  scale_spec = pl.BlockSpec(
    (1, scales[0].shape[1], t.features), lambda m, f, k: (k if in_columns else 0, 0, f), memory_space=pltpu.VMEM
  )
  return pl.pallas_call(
    kernel,
    name=f"quantized_matmul_{weight.format}",
    grid=grid,
    in_specs=[
      pl.BlockSpec((t.tokens, t.inputs), lambda m, f, k: (m, k)),
      pl.BlockSpec((t.features, columns), lambda m, f, k: (f, k)),
      *[scale_spec] * len(scales),
      *[pl.BlockSpec((t.tokens, 1), lambda m, f, k: (m, 0))] * len(x_scale),
    ],
    out_specs=pl.BlockSpec((t.tokens, t.features), lambda m, f, k: (m, f)),
    out_shape=jax.ShapeDtypeStruct((M, F), call.options.dtype),
    scratch_shapes=[
      pltpu.VMEM((t.tokens, t.features), total),
      *([] if weight.dynamic else [pltpu.VMEM((t.features, t.inputs), dtype)]),
    ],
    compiler_params=_parameters(),
    cost_estimate=_cost(M, weight, dtype, grid[0]),
  )(x, weight.values, *scales, *x_scale)


def backward(call, dy: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """dy [M, F] W^T -> [M, D]; dynamic formats as their codes say, with dy unrounded."""
  M, F = dy.shape
  t = dataclasses.replace(_tiles(M, weight), features=min(512, -(-F // LANES) * LANES))
  facts = {"format": weight.format, "tokens": min(M, 1024), "in_features": weight.in_features}
  t = tuning.tiles("quantized_gradient", call.target, t, **facts)
  D = weight.padded_features
  grid = (pl.cdiv(M, t.tokens), D // t.inputs, pl.cdiv(F, t.features))
  scales, in_columns = _scales(weight, t.inputs)

  def kernel(dy_ref, w_ref, *refs):
    scale_refs, (out_ref, acc, dense) = refs[: len(scales)], refs[len(scales) :]
    f = pl.program_id(2)

    @pl.when(f == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)

    _unpack(weight, w_ref, scale_refs if in_columns else (), dense)
    d = dy_ref[...]
    if not in_columns:
      d = d.astype(jnp.float32) * scale_refs[0][0, :1]
    w = dense[...]
    if F % t.features:  # features past the end would join the sums
      left = F - f * t.features
      d = jnp.where(lax.broadcasted_iota(jnp.int32, d.shape, 1) < left, d, 0)
      w = jnp.where(lax.broadcasted_iota(jnp.int32, w.shape, 0) < left, w, 0)
    acc[...] += lax.dot_general(
      d.astype(w.dtype),
      w,
      (((1,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
      precision=_precision(dy.dtype),
    )

    @pl.when(f == grid[2] - 1)
    def _():
      out_ref[...] = acc[...].astype(out_ref.dtype)

  columns = t.inputs // (2 if weight.packed else 1)
  scale_spec = pl.BlockSpec((1, scales[0].shape[1], t.features), lambda m, k, f: (k if in_columns else 0, 0, f))
  dx = pl.pallas_call(
    kernel,
    name=f"quantized_matmul_{weight.format}_backward",
    grid=grid,
    in_specs=[
      pl.BlockSpec((t.tokens, t.features), lambda m, k, f: (m, f)),
      pl.BlockSpec((t.features, columns), lambda m, k, f: (f, k)),
      *[scale_spec] * len(scales),
    ],
    out_specs=pl.BlockSpec((t.tokens, t.inputs), lambda m, k, f: (m, k)),
    out_shape=jax.ShapeDtypeStruct((M, D), call.options.dtype),
    scratch_shapes=[pltpu.VMEM((t.tokens, t.inputs), jnp.float32), pltpu.VMEM((t.features, t.inputs), dy.dtype)],
    compiler_params=_parameters(),
    cost_estimate=_cost(M, weight, dy.dtype, grid[0]),
  )(dy, weight.values, *scales)
  return dx[:, : weight.in_features]


def _parameters():
  return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def _precision(dtype):
  return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _cost(M, weight, dtype, token_tiles):
  D, F = weight.shape
  weights = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weight))
  moved = token_tiles * weights + M * (D + F) * dtype.itemsize
  return pl.CostEstimate(flops=2 * M * D * F, bytes_accessed=moved, transcendentals=0)


def _scales(weight: QuantizedWeight, inputs: int) -> tuple[list[jax.Array], bool]:
  """(scales, maybe zeros) [tiles along D, groups of a tile, F] in float32, and whether they belong into the tile.

  The groups are padded to 8 rows, the least that can be turned. Scales of output features, [1, 1, F], stay outside.
  """
  arrays = [weight.scales] + ([] if weight.zeros is None else [weight.zeros])
  if weight.group_size is None and weight.zeros is None:
    return [weight.scales.astype(jnp.float32)[None]], False
  size, steps = weight.group_size or weight.padded_features, weight.padded_features // inputs

  def tiled(a):
    a = a.astype(jnp.float32)
    if size >= inputs:
      a = a[jnp.arange(steps) * inputs // size][:, None]
    else:
      a = a.reshape(steps, inputs // size, -1)
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % 8), (0, 0)))

  return [tiled(a) for a in arrays], True


def _unpack(weight: QuantizedWeight, w_ref, scale_refs, dense) -> None:
  """Writes the dense tile [features, inputs]: codes, less zero points, times scales if there are `scale_refs`."""
  features, inputs = dense.shape
  turned = [ref[0].T for ref in scale_refs]  # [features, groups]
  size = weight.group_size or weight.padded_features

  def column(values, start):  # of the group of each of 128 inputs
    first = start // size
    if size >= LANES:
      return values[:, first : first + 1]
    lane = lax.broadcasted_iota(jnp.int32, (features, LANES), 1)
    spread = values[:, first : first + 1]
    for j in range(1, LANES // size):
      spread = jnp.where(lane >= j * size, values[:, first + j : first + j + 1], spread)
    return spread

  for start in range(0, inputs, LANES):
    if weight.packed:
      block, half = divmod(start, 2 * HALF)
      packed = w_ref[:, block * HALF : (block + 1) * HALF].astype(jnp.int32)
      codes = (packed >> 4 if half else packed) & 15
      if weight.format == "nf4":
        real = _nf4(codes)
      else:
        zero = column(turned[1], start) if len(turned) > 1 else 8.0
        real = codes.astype(jnp.float32) - zero
    else:
      real = w_ref[:, start : start + LANES].astype(jnp.float32)
    if turned:
      real *= column(turned[0], start)
    dense[:, start : start + LANES] = real.astype(dense.dtype)


def _nf4(codes):
  """NF4[codes]: a tree of selections, bit by bit."""
  level = [jnp.float32(v) for v in NF4]
  for bit in range(4):
    one = (codes >> bit) & 1 == 1
    level = [jnp.where(one, b, a) for a, b in zip(level[::2], level[1::2])]
  return level[0]

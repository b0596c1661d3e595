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
from jaxllm.kernels.tpu import LANES

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
  dtype = x.dtype
  t = tuning.tiles("quantized_matmul", call.target, _tiles(x.shape[0], weight), **_facts(x, weight))
  x_scale = []
  if weight.dynamic:
    x, scale = reference.quantize_rows(x, weight.values.dtype)
    x_scale = [scale[:, None]]
  x = jnp.pad(x, ((0, 0), (0, weight.padded_features - x.shape[1])))
  return _call(f"quantized_matmul_{weight.format}", t, x, x_scale, weight, dtype, call.options.dtype, False)


def backward(call, dy: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """dy [M, F] W^T -> [M, D]; dynamic formats as their codes say, with dy unrounded."""
  t = dataclasses.replace(_tiles(dy.shape[0], weight), features=min(512, -(-dy.shape[1] // LANES) * LANES))
  t = tuning.tiles("quantized_gradient", call.target, t, **_facts(dy, weight))
  name = f"quantized_matmul_{weight.format}_backward"
  dx = _call(name, t, dy, [], weight, dy.dtype, call.options.dtype, True)
  return dx[:, : weight.in_features]


def _facts(x, weight):
  return {"format": weight.format, "tokens": min(x.shape[0], 1024), "in_features": weight.in_features}


def _call(name, t, x, x_scale, weight, dtype, out_dtype, transposed):
  """x W, or x W^T if `transposed`, with dense tiles in `dtype`; or, of x in codes, by the weight's codes as they are.

  x_scale: [the scales [M, 1] of x's codes], or [] where x is numbers.
  """
  M, F, D = x.shape[0], weight.shape[-1], weight.padded_features
  scales, in_columns = _scales(weight, t.inputs)
  total = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
  tiles = pl.cdiv(F, t.features), D // t.inputs
  grid = (pl.cdiv(M, t.tokens), *(tiles[::-1] if transposed else tiles))  # what is summed over comes last

  def kernel(x_ref, w_ref, *refs):
    scale_refs, x_scale_ref = refs[: len(scales)], refs[len(scales) : len(scales) + len(x_scale)]
    out_ref, acc, *dense = refs[len(scales) + len(x_scale) :]
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)

    if dense:
      _unpack(weight, w_ref, scale_refs if in_columns else (), dense[0])
    w, rows = (dense[0] if dense else w_ref)[...], x_ref[...]
    if transposed and not in_columns:
      rows = rows.astype(jnp.float32) * scale_refs[0][0, :1]
    if transposed and F % t.features:  # features past the end would join the sums
      left = F - step * t.features
      rows = jnp.where(lax.broadcasted_iota(jnp.int32, rows.shape, 1) < left, rows, 0)
      w = jnp.where(lax.broadcasted_iota(jnp.int32, w.shape, 0) < left, w, 0)
    contract = (((1,), (0 if transposed else 1,)), ((), ()))
    acc[...] += lax.dot_general(
      rows.astype(w.dtype), w, contract, preferred_element_type=total, precision=_precision(dtype)
    )

    @pl.when(step == grid[2] - 1)
    def _():
      y = acc[...].astype(jnp.float32)
      if not (transposed or in_columns):
        y *= scale_refs[0][0, :1]
      if x_scale_ref:
        y *= x_scale_ref[0][...]
      out_ref[...] = y.astype(out_ref.dtype)

  def spec(block, place):  # place: of the blocks of tokens, features and inputs
    return pl.BlockSpec(block, (lambda m, k, f: place(m, f, k)) if transposed else place)

  of_features = spec((t.tokens, t.features), lambda m, f, k: (m, f))
  of_inputs = spec((t.tokens, t.inputs), lambda m, f, k: (m, k))
  scale_spec = spec((1, scales[0].shape[1], t.features), lambda m, f, k: (k if in_columns else 0, 0, f))
  return pl.pallas_call(
    kernel,
    name=name,
    grid=grid,
    in_specs=[
      of_features if transposed else of_inputs,
      spec((t.features, t.inputs // (2 if weight.packed else 1)), lambda m, f, k: (f, k)),
      *[scale_spec] * len(scales),
      *[spec((t.tokens, 1), lambda m, f, k: (m, 0))] * len(x_scale),
    ],
    out_specs=of_inputs if transposed else of_features,
    out_shape=jax.ShapeDtypeStruct((M, D if transposed else F), out_dtype),
    scratch_shapes=[
      pltpu.VMEM((t.tokens, t.inputs if transposed else t.features), total),
      *([] if x_scale else [pltpu.VMEM((t.features, t.inputs), dtype)]),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    ),
    cost_estimate=_cost(M, weight, dtype, grid[0]),
  )(x, weight.values, *scales, *x_scale)


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

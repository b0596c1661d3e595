"""Forward product on Hopper: weights are the left operand of the tensor core, y^T = W^T x^T.

The tensor core of Hopper takes its left operand from registers, 64 rows at a time, and its right one from shared
memory in any width from 8. So the weights go left: a warpgroup reads a tile of codes from shared memory, unpacks and
scales it in registers and multiplies; tokens are the right operand, 8 of them in decoding, 256 in prefill. (Marlin,
arXiv 2408.11743, is the model for 4 bits; for the operand swap, jax's own mixed-type example for Hopper.) Codes of the
dynamic formats go to the tensor core as they are.

With few tokens, time should go into reading weights only: 13 bytes a cycle come to a multiprocessor of an H100, and
making bfloat16 of two codes takes ten instructions, too many for 4 bits. Four codes of int4 are operands of the 8-bit
tensor core after one or two: the low halves of bytes are numbers from 0 to 15, the high ones 16 times one from -8 to 7.
So there tokens become integers of 15 bits (`integers.split`) in two products of 8 bits, which are exact, and scales
meet the groups' sums in float32 (`_integer_sums`). For nf4 there is no such way, and it takes four times what memory
would.

TMA copies run ahead in a warpgroup of their own. Where the tiles are fewer than the multiprocessors, the contraction
is split, and the parts, float32 and transposed, are summed outside; so is a result in float32, of one part.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxllm.kernels import tuning
from jaxllm.kernels.hopper import COLUMN, MULTIPROCESSORS, ROW, WGMMA, swizzled
from jaxllm.kernels.integers import split, split_scale
from jaxllm.kernels.quantized import reference
from jaxllm.kernels.quantized.mosaic_gpu_backward import backward
from jaxllm.kernels.quantized.mosaic_gpu_tiles import load_codes, scale_rows, scaled
from jaxllm.kernels.quantized.weights import HALF, QuantizedWeight

__all__ = ["Tiles", "backward", "forward", "refuses"]

WARPGROUPS = 2  # that compute


@dataclasses.dataclass(frozen=True)
class Tiles:
  """features: of a block, 128 or 256. tokens: of a block, 8 to 128. row_bytes: of each weight row and step, 64 or 128.
  steps: that copies run ahead. splits: of the contraction."""

  features: int
  tokens: int
  row_bytes: int
  steps: int
  splits: int


def _tiles(M: int, weight: QuantizedWeight, wide: bool) -> Tiles:
  """Not yet measured. Long rows and many copies in flight while memory is the limit; once it is the tensor core, more
  features than tokens, because a token's activations take two to four times the bytes of a feature's codes."""
  tokens = next((t for t in (8, 16, 32, 64) if t >= M), 128)
  features = 256 if tokens == 128 else 128
  row_bytes = 64 if tokens == 128 and not weight.dynamic else 128
  if _as_integers(weight, tokens) and weight.group_size in (32, 64):
    row_bytes = 64  # fewer groups for `_integer_sums` to take apart
  blocks = pl.cdiv(M, tokens) * pl.cdiv(weight.shape[-1], features)
  total = weight.values.shape[-1] // row_bytes
  splits = 1
  while tokens < 128 and blocks * splits <= MULTIPROCESSORS // 2 and total % (2 * splits) == 0 and total >= 8 * splits:
    splits *= 2
  per_step = features * row_bytes + tokens * row_bytes * (1 if weight.dynamic else 4 if weight.packed else 2)
  if weight.group_size:
    per_step += 16 * features * max(1, row_bytes // weight.group_size)
  spare = (224 << 10) - WARPGROUPS * tokens * 64 * (4 if wide or splits > 1 else 2)
  return Tiles(features, tokens, row_bytes, max(1, min(8, spare // per_step, total // splits)), splits)


def _as_integers(weight: QuantizedWeight, tokens: int) -> bool:
  """Whether the product is one of integers; groups of 32 with more tokens take too many registers."""
  return weight.format == "int4" and tokens <= (16 if weight.group_size == 32 else 32)


def refuses(call, x: jax.Array, weight: QuantizedWeight) -> str | None:
  """Why these kernels cannot compute the call, or None."""
  if x.dtype != jnp.bfloat16:
    return f"bfloat16 activations only, not {x.dtype}"
  size = weight.group_size
  if size not in (None, 32, 64, 128) and size % (2 * HALF):
    return f"groups of 32, 64, 128 or a multiple of 256, not {size}"
  return None


def forward(call, x: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """x [M, D] W -> [M, F] in bfloat16 or float32."""
  M, D = x.shape
  F = weight.shape[-1]
  facts = {"format": weight.format, "tokens": min(M, 128), "in_features": weight.in_features}
  wide = call.options.dtype == jnp.float32
  t = tuning.tiles("quantized_matmul", call.target, _tiles(M, weight, wide), **facts)
  Mp, Fp = pl.cdiv(M, t.tokens) * t.tokens, pl.cdiv(F, t.features) * t.features
  x_scale = None
  if weight.dynamic:
    x, x_scale = reference.quantize_rows(x, weight.values.dtype)
    x_scale = jnp.pad(x_scale, (0, Mp - M))
  x = jnp.pad(x, ((0, Mp - M), (0, weight.padded_features - D)))
  if _as_integers(weight, t.tokens):
    x, x_scale = split(x)
    x = x.reshape(2, -1, t.tokens, x.shape[-1]).swapaxes(0, 1).reshape(2 * Mp, -1)  # both of a tile's tokens together
  apart = wide or t.splits > 1
  out = _call(x, weight, x_scale, t, Fp, apart)
  if apart:
    out = out.sum(0).T.astype(call.options.dtype)
  return out[:M, :F]


def _call(x, weight, x_scale, t, Fp, apart):
  integers = _as_integers(weight, t.tokens)
  x_rows = t.tokens * (2 if integers else 1)
  row_total, Mp = weight.values.shape[1], x.shape[0] // x_rows * t.tokens
  grouped = weight.group_size is not None
  values = lax.bitcast_convert_type(weight.values, jnp.int8) if weight.packed else weight.values
  scales = scale_rows(weight, Fp)  # (scales,) or (scales, zeros), float32, F padded
  halves = 2 if weight.packed else 1
  rows = t.features // WARPGROUPS  # weight rows of a warpgroup
  per_split = row_total // t.row_bytes // t.splits
  pieces = HALF // t.row_bytes if weight.packed else 1  # steps in which a packed block is read

  def x_block(half, k):  # which piece of D, counted in row_bytes, meets this half of the codes of step k
    return k if halves == 1 else (k // pieces * halves + half) * pieces + k % pieces

  groups = max(1, t.row_bytes // weight.group_size) if grouped else 1  # of a piece of D
  w_transforms = swizzled(t.row_bytes, values.dtype)
  x_transforms = swizzled(t.row_bytes, x.dtype)
  out_dtype = jnp.float32 if apart else jnp.bfloat16

  def kernel(values_gmem, x_gmem, *rest):
    *scale_gmem, out_gmem, out_smem = rest
    part, mi, fi = lax.axis_index("part"), lax.axis_index("m"), lax.axis_index("f")
    wg = lax.axis_index("wg")
    mine = pl.ds(wg * rows, rows)
    first, f0, m0 = part * per_split, fi * t.features + wg * rows, mi * t.tokens

    def per_feature(ref):
      return plgpu.load(ref.at[0, pl.ds(f0, rows)], layout=ROW, optimized=False)

    def body(_, w_smem, *refs):
      *refs, acc = refs
      if integers:
        zero = None if grouped or weight.zeros is None else per_feature(scale_gmem[1])
        acc = _integer_sums(acc, w_smem.at[mine], refs[:halves], refs[halves:], mine, zero)
        plgpu.commit_smem()
        return acc
      if weight.dynamic:
        plgpu.wgmma(acc, w_smem.at[mine], refs[0].T)
      else:
        tile = plgpu.layout_cast(plgpu.load(w_smem.at[mine], layout=plgpu.Layout.WGMMA_UPCAST_2X), WGMMA)
        zero = None if grouped or weight.zeros is None else per_feature(scale_gmem[1])
        for half in range(halves):
          a = scaled(weight, load_codes(weight, tile, half), refs[halves + half :: halves], mine, zero)
          plgpu.wgmma(acc, a, refs[half].T)
        plgpu.commit_smem()  # what was read by loads is next written by a copy
      plgpu.wgmma_wait(0)
      return acc

    def context(run):
      if integers:
        y = run(plgpu.layout_cast(jnp.zeros((rows, t.tokens), jnp.float32), WGMMA))
      else:
        dtype = jnp.int32 if values.dtype == jnp.int8 and weight.dynamic else jnp.float32
        acc = pl.run_scoped(lambda acc: (run(acc), acc[...])[1], plgpu.ACC((rows, t.tokens), dtype))
        y = acc.astype(jnp.float32)
      if not grouped:
        y *= lax.broadcast_in_dim(per_feature(scale_gmem[0]), y.shape, [0])
      if x_scale is not None:
        column = plgpu.load(scale_gmem[-1].at[pl.ds(m0, t.tokens)], layout=COLUMN, optimized=False)
        if integers:
          column = split_scale(column)
        y *= lax.broadcast_in_dim(column, y.shape, [1])
      for i in range(rows // 64):
        piece, features, tokens = y[i * 64 : (i + 1) * 64], pl.ds(f0 + i * 64, 64), pl.ds(m0, t.tokens)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if apart:
          out_smem[wg] = piece
          there = out_gmem.at[part, features, tokens]
        else:
          out_smem.at[wg].T[...] = plgpu.layout_cast(piece.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
          there = out_gmem.at[tokens, features]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[wg], there)
      plgpu.wait_smem_to_gmem(0)

    def scale_block(half, k):
      return x_block(half, first + k) * t.row_bytes // weight.group_size // groups, fi

    spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM)
    in_specs = [spec((t.features, t.row_bytes), lambda k: (fi, first + k), transforms=w_transforms)]
    operands = [values_gmem]
    for half in range(halves):
      in_specs.append(
        spec((x_rows, t.row_bytes), lambda k, half=half: (mi, x_block(half, first + k)), transforms=x_transforms)
      )
      operands.append(x_gmem)
    if grouped:
      for ref in scale_gmem[: len(scales)]:
        for half in range(halves):
          in_specs.append(spec((groups, t.features), functools.partial(scale_block, half)))
          operands.append(ref)
    plgpu.emit_pipeline_warp_specialized(
      body,
      grid=(per_split,),
      memory_registers=40,
      in_specs=in_specs,
      wg_axis="wg",
      num_compute_wgs=WARPGROUPS,
      max_concurrent_steps=min(t.steps, per_split),
      compute_context=context,
    )(*operands)

  if apart:
    out_shape, out_smem = (t.splits, Fp, Mp), plgpu.SMEM((WARPGROUPS, 64, t.tokens), jnp.float32)
  else:
    out_shape = (Mp, Fp)
    out_smem = plgpu.SMEM((WARPGROUPS, t.tokens, 64), jnp.bfloat16, transforms=(plgpu.SwizzleTransform(128),))
  extra = () if x_scale is None else (x_scale,)
  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
    grid=(t.splits, Mp // t.tokens, Fp // t.features),
    grid_names=("part", "m", "f"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"quantized_matmul_{weight.format}",
    compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    scratch_types=[out_smem],
  )
  return call(values, x, *scales, *extra)


def _integer_sums(sums, codes_smem, x_smem, scale_smem, mine, zero):
  """sums [features, tokens] plus a step's codes, less zero points, times its tokens, times scales.

  x_smem: for the low halves of bytes and for the high ones, the tokens' upper and lower numbers [2 tokens, bytes].
  scale_smem: for either half its scales, then its zero points if there are any; or empty: the scales are of features
  and multiply the result, and so do the zero points, `zero` or None.
  """
  layout = plgpu.Layout.WGMMA_8BIT
  tile = plgpu.load(codes_smem, layout=layout)
  halves = (tile & jnp.int8(15), 1, 8.0), ((tile ^ jnp.int8(-128)) & jnp.int8(-16), 16, 0.0)  # numbers, unit, their 8
  with_zeros = len(scale_smem) > 2 or zero is not None
  tokens, groups = sums.shape[1], scale_smem[0].shape[0] if scale_smem else 1
  width = tile.shape[1] // groups

  def constant(value, columns):
    return plgpu.layout_cast(jnp.full((tile.shape[0], columns), value, jnp.int8), layout)

  def of_group(x, group):  # zeros in the columns of others
    if groups == 1:
      return x
    others = [constant(0, width)] * (groups - 1)
    return lax.concatenate([*others[:group], x[:, group * width : (group + 1) * width], *others[group:]], 1)

  def spread(row):
    return lax.broadcast_in_dim(row, sums.shape, [0])

  for group in range(groups):

    def products(*accs, group=group):
      for (codes, _, offset), x, product, total in zip(halves, x_smem, accs[::2], accs[1::2]):
        plgpu.wgmma(product, of_group(codes, group), x.T)
        if with_zeros or offset:
          plgpu.wgmma(total, of_group(constant(1, tile.shape[1]), group), x.T)
      plgpu.wgmma_wait(0)
      return [acc[...] for acc in accs]

    found = pl.run_scoped(products, *[plgpu.ACC((tile.shape[0], 2 * tokens), jnp.int32)] * 4)
    for half, (_, unit, offset) in enumerate(halves):
      product, total = (x[:, :tokens] * 256 + x[:, tokens:] for x in found[2 * half : 2 * half + 2])
      part = product.astype(jnp.float32)
      if with_zeros:
        less = zero if zero is not None else plgpu.load(scale_smem[2 + half].at[group, mine], layout=ROW)
        part -= total.astype(jnp.float32) * spread((less - (8.0 - offset)) * unit)
      elif offset:
        part = (product - total * int(offset)).astype(jnp.float32)
      if scale_smem:
        part *= spread(plgpu.load(scale_smem[half].at[group, mine], layout=ROW) * (1 / unit))
      else:
        part *= 1 / unit
      sums += part
  return sums

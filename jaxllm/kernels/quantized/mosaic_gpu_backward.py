"""The activations' gradient on Hopper, dx = dy W^T: tiles of the weight become dense in shared memory.

Here the contraction runs across the rows of codes, so that they cannot go from registers to the tensor core as they
lie. Each warpgroup makes its 128 columns of the tile dense (of a packed tile one takes the low halves of the bytes, the
other the high ones) in one of two buffers of its own, while its product of the step before still runs.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxllm.kernels.hopper import TILED, WGMMA, swizzled
from jaxllm.kernels.quantized.mosaic_gpu_tiles import load_codes, scale_rows, scaled
from jaxllm.kernels.quantized.weights import HALF, QuantizedWeight

WARPGROUPS = 2  # that compute; each owns HALF columns of dx
FEATURES = 64  # of a step of the contraction
STEPS = 4  # that copies run ahead


def backward(call, dy: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """dy [M, F] W^T -> [M, D], rounded to bfloat16; dynamic formats as their codes say, with dy unrounded."""
  M, F = dy.shape
  tokens = 64 if M <= 64 else 128  # of a block
  # Two steps at least: a slot is handed back one step after it was read.
  Mp, Fp = pl.cdiv(M, tokens) * tokens, max(pl.cdiv(F, FEATURES), 2) * FEATURES
  dx = _call(jnp.pad(dy, ((0, Mp - M), (0, Fp - F))), weight, tokens)
  return dx[:M, : weight.in_features].astype(call.options.dtype)


def _call(dy, weight, tokens):
  Mp, Fp = dy.shape
  D = weight.padded_features
  blocks = pl.cdiv(D, WARPGROUPS * HALF)
  values = lax.bitcast_convert_type(weight.values, jnp.int8) if weight.packed else weight.values
  scales = scale_rows(weight, Fp)
  size = weight.group_size or D
  groups = max(1, HALF // size)  # of a warpgroup's columns

  def kernel(dy_gmem, values_gmem, *rest):
    *scale_gmem, out_gmem, dense = rest
    di, mi = lax.axis_index("d"), lax.axis_index("m")
    wg = lax.axis_index("wg")
    every = pl.ds(0, FEATURES)

    def body(indices, dy_smem, *refs):
      *refs, acc = refs
      codes, refs = (refs[:1] * 2, refs[1:]) if weight.packed else (refs[:2], refs[2:])
      buffer = dense.at[wg, lax.rem(indices[0], 2)]
      for half in range(WARPGROUPS):

        @pl.when(wg == half)
        def _(half=half):
          tile = plgpu.load(codes[half], layout=plgpu.Layout.WGMMA_UPCAST_2X)
          tile = load_codes(weight, plgpu.layout_cast(tile, WGMMA), half)
          buffer[...] = scaled(weight, tile, refs[half::WARPGROUPS], every, None)

      plgpu.commit_smem()
      plgpu.wgmma(acc, dy_smem, buffer)
      plgpu.wgmma_wait(1)
      return acc

    def context(run):
      acc = pl.run_scoped(lambda acc: (run(acc), acc[...])[1], plgpu.ACC((tokens, HALF), jnp.float32))
      for i in range(tokens // 64):
        dense[wg, i] = acc[i * 64 : (i + 1) * 64].astype(jnp.bfloat16)
        plgpu.commit_smem()
        there = out_gmem.at[pl.ds(mi * tokens + i * 64, 64), pl.ds((di * WARPGROUPS + wg) * HALF, HALF)]
        plgpu.copy_smem_to_gmem(dense.at[wg, i], there)
      plgpu.wait_smem_to_gmem(0)

    spec = functools.partial(plgpu.BlockSpec, memory_space=plgpu.SMEM, delay_release=1)
    in_specs = [spec((tokens, FEATURES), lambda f: (mi, f), transforms=TILED)]
    for half in range(1 if weight.packed else WARPGROUPS):
      column = (lambda f: (f, di)) if weight.packed else (lambda f, half=half: (f, di * WARPGROUPS + half))
      in_specs.append(spec((FEATURES, HALF), column, transforms=swizzled(HALF, jnp.int8)))
    for _ in scale_gmem:
      for half in range(WARPGROUPS):
        in_specs.append(
          spec((groups, FEATURES), lambda f, half=half: ((di * WARPGROUPS + half) * HALF // size // groups, f))
        )
    plgpu.emit_pipeline_warp_specialized(
      body,
      grid=(Fp // FEATURES,),
      memory_registers=40,
      in_specs=in_specs,
      wg_axis="wg",
      num_compute_wgs=WARPGROUPS,
      max_concurrent_steps=min(STEPS, Fp // FEATURES),
      compute_context=context,
    )(
      dy_gmem,
      *[values_gmem] * (1 if weight.packed else WARPGROUPS),
      *[ref for ref in scale_gmem for _ in range(WARPGROUPS)],
    )

  call = plgpu.kernel(
    kernel,
    out_type=jax.ShapeDtypeStruct((Mp, blocks * WARPGROUPS * HALF), jnp.bfloat16),
    grid=(blocks, Mp // tokens),
    grid_names=("d", "m"),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    kernel_name=f"quantized_matmul_{weight.format}_backward",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    scratch_types=[plgpu.SMEM((WARPGROUPS, 2, FEATURES, HALF), jnp.bfloat16, transforms=TILED)],
  )
  return call(dy, values, *scales)

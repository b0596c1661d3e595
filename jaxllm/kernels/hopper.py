"""What the kernels for Hopper share: the chip's sizes, and layouts of registers and of shared memory."""

import math

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

LOG2E = math.log2(math.e)
ROWS = 64  # of one wgmma
MULTIPROCESSORS = 132  # of H100 and H200
SHARED_MEMORY = 232448  # bytes of a block
LARGEST_GRID = 65535  # of every axis but the fastest
WGMMA, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def swizzled(
  columns: int, dtype=jnp.bfloat16, swizzle: int | None = None
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
  """How wgmma and the copy engine want rows of so many columns: a swizzle of 128 bytes, or of less where those are no
  multiple of it."""
  size = jnp.dtype(dtype).itemsize
  swizzle = swizzle or next(width for width in (128, 64, 32) if columns * size % width == 0)
  return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


TILED = swizzled(64)  # 16-bit operands in rows of a multiple of 64

"""What the kernels for TPUs share: the chips' sizes, and products in float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LANES = 128  # of a vector, and columns of a tile in memory
# Bytes of vector memory that a kernel may take: half, or three quarters, of what there is. Others: not known here.
VMEM = {"v5e": 64 << 20, "v6e": 64 << 20, "v5p": 48 << 20, "v7": 48 << 20}


def dot(a: Array, b: Array, axes: tuple[int, int]) -> Float[Array, "R C"]:
  """Product over an axis of each, in float32; float32 operands are multiplied as such."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), precision, jnp.float32)

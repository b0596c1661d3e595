"""`grouped_matmul`: the product of a mixture of experts, with its gradients, by named backends."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import dispatch
from jaxllm.kernels.grouped import varying


def _whole(split, weights, dtype):
  """The matrices as they are multiplied."""
  weights = weights.astype(dtype)
  return weights if split is None else lax.all_gather(weights, split[0], axis=split[1], tiled=True)


def _forward(call, x, weights, sizes):
  """By the backend's `forward(call, x, weights, sizes, transposed=False)`; transposed: the matrices are [N, K]."""
  return call.module.forward(call, x, _whole(call.options, weights, x.dtype), sizes)


def _backward(call, kept, dy):
  """By the backend's `backward(call, x, dy, sizes, dtype)`, x_e^T dy_e for each group e in `dtype`, and `forward`."""
  x, weights, sizes = kept
  dx = call.module.forward(call, dy, _whole(call.options, weights, x.dtype), sizes, transposed=True)
  dw, split = call.module.backward(call, x, dy, sizes, weights.dtype), call.options
  return dx, dw if split is None else lax.psum_scatter(dw, split[0], scatter_dimension=split[1], tiled=True), None


OP = dispatch.Op("grouped", _forward, backward=_backward, once=True)


def grouped_matmul(
  x: Float[Array, "M D"],
  weights: Float[Array, "E D F"],
  group_sizes: Int[Array, " E"],
  *,
  backend: str | None = None,
  target: str | None = None,
  split: tuple[tuple[str, ...], int] | None = None,
) -> Float[Array, "M F"]:
  """Each row of x times the matrix of its group: group e is the next group_sizes[e] rows, in order.

  Sums run in float32, the result has x's dtype. `weights` may be float32 beside a 16-bit x (master weights): they are
  rounded to x's dtype inside, in the backward pass again, and their gradient comes out in their own dtype (the Pallas
  kernels round it to x's once, after the sum). Rows past the sum of the sizes belong to no group: they give zeros,
  get zero gradients, and whatever they hold (NaN too) reaches nothing else; nor does a group's NaN reach the other
  groups. Differentiable in x and weights, once; a group without rows gives zeros as its matrix' gradient. No copy of
  x for each expert and no transposed copy of the weights is made: the kernels visit tiles of rows with the matrix of
  their group (MegaBlocks, Gale et al. 2022, arXiv 2211.15841), a tile that groups share once for each.

  Args:
    group_sizes: int32, not negative. What of them goes past M is cut off.
    backend, target: as in `backends.choose`.
    split: inside shard_map, (mesh axes, 1 or 2): over which axes the matrices are split along that dimension. They are
      gathered in x's dtype; their gradients are summed and split again in their own.

  Raises:
    ConfigError: the backend cannot compute what is asked, or the shapes or dtypes do not fit together.
  """
  split = split if split and split[0] else None
  whole = jax.eval_shape(lambda weights: _whole(split, weights, x.dtype), weights)
  (M, D), (E, *matrix) = x.shape, whole.shape
  wide = jnp.promote_types(x.dtype, weights.dtype) == weights.dtype
  if len(matrix) != 2 or matrix[0] != D or group_sizes.shape != (E,) or not wide:
    raise ConfigError(
      "grouped_matmul takes x [M, D], weights [E, D, F] of the same dtype or a wider one and group_sizes [E]; "
      f"these are {x.dtype}{x.shape}, {weights.dtype}{whole.shape}, {group_sizes.shape}"
    )
  call = dispatch.choose("grouped_matmul", OP, backend, target, split, x, whole)
  if not (x.size and weights.size):
    return jnp.zeros((M, matrix[1]), x.dtype)
  # Inside shard_map all operands vary over the same axes; the transpose of that is the sum of their gradients.
  return dispatch.run(call, *varying.alike(x, weights, group_sizes.astype(jnp.int32)))

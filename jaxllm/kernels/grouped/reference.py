"""`grouped_matmul` in plain XLA: a loop over tiles of rows, each with the matrix of its group.

On CPU and GPU XLA's own `ragged_dot` copies x once for each expert and multiplies all of it by each expert's matrix;
for TPUs it has a kernel that does not, and there it is used.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels import tuning
from jaxllm.kernels.backends import TARGETS
from jaxllm.kernels.grouped import varying


@dataclasses.dataclass(frozen=True)
class Tiles:
  """rows: of x at once."""

  rows: int


def forward(call, x, weights, sizes, transposed=False) -> Float[Array, "M N"]:
  """Rows times their group's matrix."""
  if _native(call.target):
    real = _real(x, sizes)
    numbers = lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    y = lax.ragged_dot_general(jnp.where(real, x, 0), weights, sizes, numbers)
    return jnp.where(real, y, 0)
  M, N = x.shape[0], weights.shape[1 if transposed else 2]
  rows = min(M, _rows(weights.shape[0], M, x.dtype, call.target))
  starts, ends = _bounds(sizes, M)
  count = (ends - starts + rows - 1) // rows
  last = jnp.cumsum(count)  # tiles of this group and those before

  def step(tile, out):
    group = jnp.searchsorted(last, tile, side="right", method="compare_all").astype(jnp.int32)
    first, end = starts[group] + (tile - last[group] + count[group]) * rows, ends[group]
    at = jnp.minimum(first, M - rows)
    matrix = lax.dynamic_index_in_dim(weights, group, keepdims=False)
    y = _dot(lax.dynamic_slice_in_dim(x, at, rows), matrix, 1, 1 if transposed else 0).astype(x.dtype)
    place = at + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    y = jnp.where((place >= first) & (place < end), y, lax.dynamic_slice_in_dim(out, at, rows))
    return lax.dynamic_update_slice_in_dim(out, y, at, 0)

  return lax.fori_loop(0, last[-1], step, varying.zeros((M, N), x.dtype, x))


def backward(call, x, dy, sizes, dtype) -> Float[Array, "E D F"]:
  """Of each group's matrix, in `dtype`."""
  if _native(call.target):
    real = _real(x, sizes)
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    x, dy = jnp.where(real, x, 0), jnp.where(real, dy, 0)
    return lax.ragged_dot_general(x, dy, sizes, numbers, preferred_element_type=dtype)
  M = x.shape[0]
  rows = min(M, _rows(sizes.shape[0], M, x.dtype, call.target))

  def of_group(bounds):
    start, end = bounds

    def step(state):
      first, total = state
      at = jnp.minimum(first, M - rows)
      place = at + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
      own = (place >= first) & (place < end)
      a, b = (jnp.where(own, lax.dynamic_slice_in_dim(array, at, rows), 0) for array in (x, dy))
      return first + rows, total + _dot(a, b, 0, 0)

    state = start, varying.zeros((x.shape[1], dy.shape[1]), jnp.float32, x)
    return lax.while_loop(lambda state: state[0] < end, step, state)[1].astype(dtype)

  return lax.map(of_group, _bounds(sizes, M))


def _native(target):
  return target is not None and TARGETS[target] == "tpu"


def _rows(groups, M, dtype, target):
  """Rows of a tile: about a group's share, so that little of a tile is another group's."""
  share = min(512, max(16, 1 << (M // groups - 1).bit_length()))
  return tuning.tiles("grouped_matmul_xla", target, Tiles(share), share=share, dtype=jnp.dtype(dtype).name).rows


def _bounds(sizes, M):
  ends = jnp.cumsum(sizes)
  return jnp.minimum(ends - sizes, M), jnp.minimum(ends, M)


def _real(x, sizes):
  return (jnp.arange(x.shape[0]) < sizes.sum())[:, None]


def _dot(a, b, a_axis, b_axis):
  numbers = (((a_axis,), (b_axis,)), ((), ()))
  return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)

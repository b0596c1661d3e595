"""Arrays inside shard_map that differ from device to device: what a kernel makes must say so too."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def axes(*arrays: Array) -> frozenset[str]:
  """The mesh axes along which any of the arrays differs."""
  return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def alike(*arrays: Array) -> tuple[Array, ...]:
  """The arrays, each marked as differing along every axis along which one of them does."""
  every = axes(*arrays)

  def mark(array):
    missing = tuple(every - axes(array))
    return lax.pcast(array, missing, to="varying") if missing else array

  return tuple(mark(array) for array in arrays)


def zeros(shape: tuple[int, ...], dtype, like: Array) -> Array:
  """Zeros to start a loop from whose result differs where `like` does."""
  return alike(jnp.zeros(shape, dtype), like)[0]


def result(shape: tuple[int, ...], dtype, like: Array) -> jax.ShapeDtypeStruct:
  """The result of a kernel that reads `like`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)

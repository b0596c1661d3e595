"""Parameters and the functions that use them: products and lookups.

A parameter may be float32 (a master weight) beside 16-bit activations. Each function rounds it where it uses it, and
its gradient is summed over tokens in float32 and leaves in the parameter's own dtype.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.kernels.matmul import matmul
from jaxllm.models.config import Compute
from jaxllm.parallel.rows import add_rows
from jaxllm.parallel.sharding import constrain

LogicalAxes = tuple[str | None, ...]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, init: Callable) -> nnx.Param:
  """Declares a weight: shape, initializer and logical axes together; float32 until it is cast."""
  return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


def project(x: Float[Array, "*B I"], weight: Float[Array, "I O"], *, backend: str) -> Float[Array, "*B O"]:
  """x @ weight, in x's dtype; a weight that is not a plain array carries its own multiplication."""
  if isinstance(weight, (jax.Array, np.ndarray)):
    return matmul(x, weight, backend=backend)
  return weight.project(x, backend=backend)


def dense(weight, dtype=None) -> Array:
  """A weight as a plain array, for the products that `project` does not know (experts, latent attention).

  dtype: None takes it as it lies, for products that round it themselves.
  """
  return jnp.asarray(weight if isinstance(weight, (jax.Array, np.ndarray)) else weight.dense(), dtype)


def rows(table: Float[Array, "V D"], ids: Int[Array, "B T"], dtype, axis: str | None = None) -> Float[Array, "B T D"]:
  """table[ids] in `dtype`; rows past the table are NaN, in floating point.

  A table of 16 bits too has its gradient summed in float32 and rounded once: of a token that stands in the batch
  10,000 times, a sum in bfloat16 keeps a few hundred.

  Args:
    axis: the logical axis of the table's rows; that of its columns is "embed".
  """
  return _rows(table, ids, jnp.dtype(dtype), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _rows(table, ids, dtype, axis):
  # FSDP gathers the table, not the activations: a lookup in a table split along D would come out split so. Rounded
  # where it is split, so that 16 bits travel.
  rounded = constrain(table.astype(dtype), axis, "embed")
  return jnp.take(constrain(rounded, axis, None), ids, axis=0)


def _rows_forward(table, ids, dtype, axis):
  return _rows(table, ids, dtype, axis), (table, ids)


def _rows_backward(dtype, axis, saved, dy):
  table, ids = saved
  return add_rows(dy, ids, table.shape[0], axis).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


class Linear(nnx.Module):
  """x @ weight [I, O] (+ bias [O])."""

  def __init__(self, inputs, outputs, axes: LogicalAxes, *, init, bias=False, compute: Compute = Compute(), rngs):
    self.weight = parameter(rngs, (inputs, outputs), axes, init)
    self.bias = parameter(rngs, (outputs,), (axes[1],), nnx.initializers.zeros) if bias else None
    self.compute = compute

  def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    y = project(x, self.weight.get_value(), backend=self.compute.backend("matmul"))
    if self.bias is None:
      return y
    # Added in float32, so that the sum over tokens in its gradient is in float32 too.
    return (y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(y.dtype)

"""Parameters and the one function that multiplies by them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.kernels.matmul import matmul

LogicalAxes = tuple[str | None, ...]


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, init: Callable) -> nnx.Param:
  """Declares a weight: shape, initializer and logical axes together; float32 until it is cast."""
  return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


def project(x: Float[Array, "*B I"], weight: Float[Array, "I O"], *, backend: str) -> Float[Array, "*B O"]:
  """x @ weight, in x's dtype; a weight that is not a plain array carries its own multiplication."""
  if isinstance(weight, (jax.Array, np.ndarray)):
    return matmul(x, weight.astype(x.dtype), backend=backend)
  return weight.project(x, backend=backend)


def dense(weight, dtype) -> Array:
  """A weight as a plain array, for the products that `project` does not know (experts, latent attention)."""
  return jnp.asarray(weight if isinstance(weight, (jax.Array, np.ndarray)) else weight.dense(), dtype)


class Linear(nnx.Module):
  """x @ weight [I, O] (+ bias [O])."""

  def __init__(self, inputs, outputs, axes: LogicalAxes, *, init, bias=False, backend="xla", rngs):
    self.weight = parameter(rngs, (inputs, outputs), axes, init)
    self.bias = parameter(rngs, (outputs,), (axes[1],), nnx.initializers.zeros) if bias else None
    self.backend = backend

  def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    y = project(x, self.weight.get_value(), backend=self.backend)
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)

"""How a parameter is declared, and the matrix with a bias that most of them are part of."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.models.config import Compute
from jaxllm.models.weights import dense, project
from jaxllm.parallel.sharding import LogicalAxes


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: LogicalAxes, init: Callable) -> nnx.Param:
  """Declares a weight: shape, initializer and logical axes together; float32 until it is cast."""
  return nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=axes)


class Linear(nnx.Module):
  """x @ weight [I, O] (+ bias [O])."""

  def __init__(self, inputs, outputs, axes: LogicalAxes, *, init, bias=False, compute: Compute = Compute(), rngs):
    self.weight = parameter(rngs, (inputs, outputs), axes, init)
    self.bias = parameter(rngs, (outputs,), (axes[1],), nnx.initializers.zeros) if bias else None
    self.axes, self.compute = axes, compute

  def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    y = project(x, self.weight.get_value(), self.compute, self.axes)
    if self.bias is None:
      return y
    # Added in float32, so that the sum over tokens in its gradient is in float32 too.
    return (y.astype(jnp.float32) + dense(self.bias.get_value(), jnp.float32)).astype(y.dtype)

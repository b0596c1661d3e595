"""The head's loss from the very logits that a model gives token by token: products in order, statistics in C++."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels.elementwise import logit_statistics
from jaxllm.kernels.head_loss import cpu
from jaxllm.kernels.head_loss.chunks import Statistics
from jaxllm.kernels.matmul import product_in_order

ROWS = 512  # whose logits are held at once


def forward(call, x, head, targets) -> Statistics:
  """Of every token's logits."""
  softcap, transposed = call.options.softcap, call.options.transposed

  def some(part):
    z = product_in_order(part[0], head, jnp.float32, transpose_b=transposed)
    if softcap is not None:
      z = softcap * jnp.tanh(z / softcap)
    return logit_statistics(z, part[1])

  size = max(1, min(call.options.chunk or ROWS, len(x)))
  pad = -len(x) % size
  parts = jnp.pad(x, ((0, pad), (0, 0))), jnp.pad(targets, (0, pad))
  stats = lax.map(some, jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), parts))
  return Statistics(*jnp.swapaxes(stats, 0, 1).reshape(4, -1)[:, : len(x)])


def backward(call, x, head, targets, coefficients) -> tuple[Statistics, Float[Array, "M D"], Array | None]:
  """Statistics in order, and the gradients by the CPU's other kernel."""
  return forward(call, x, head, targets), *cpu.backward(call, x, head, targets, coefficients)[1:]

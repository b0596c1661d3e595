"""The head's loss on CPUs: the C++ kernel (`kernels/cpu/cross_entropy.cc`) where it can, else the XLA form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_ffi
from jaxllm.kernels.head_loss import reference
from jaxllm.kernels.head_loss.chunks import Statistics


def forward(call, x, head, targets) -> Statistics:
  """Of every token's logits."""
  if not _native(x, head, call.options):
    return reference.forward(call, x, head, targets)
  return _call(x, head, targets, jnp.zeros((4, x.shape[0]), jnp.float32), call.options, grad=False)[0]


def backward(call, x, head, targets, coefficients) -> tuple[Statistics, Float[Array, "M D"], Array | None]:
  """Statistics, and the gradients of x and, in float32, of the head, where it is asked for."""
  if not _native(x, head, call.options):
    return reference.backward(call, x, head, targets, coefficients)
  return _call(x, head, targets, jnp.stack(coefficients), call.options, grad=True)


def _native(x, head, options):
  dtypes = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
  known = {x.dtype, head.dtype} <= dtypes and not (x.dtype == jnp.float32 and head.dtype == jnp.bfloat16)
  return known and options.softcap is None and cpu_ffi.available()


def _call(x, head, targets, coefficients, options, grad):
  out = (
    jax.ShapeDtypeStruct((4, x.shape[0]), jnp.float32),
    jax.ShapeDtypeStruct(x.shape if grad else (0, 0), x.dtype),
    jax.ShapeDtypeStruct(head.shape if grad and options.of_head else (0, 0), jnp.float32),
  )
  stats, dx, d_head = cpu_ffi.call(
    "cpu_cross_entropy", out, x, head, targets, coefficients, transposed=options.transposed, grad=grad
  )
  return Statistics(*stats), dx, d_head if options.of_head else None

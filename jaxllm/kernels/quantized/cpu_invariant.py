"""The C++ product that computes a few rows as it does many; the gradient is the plain form."""

import jax

from jaxllm.kernels.quantized import cpu
from jaxllm.kernels.quantized.reference import backward
from jaxllm.kernels.quantized.weights import QuantizedWeight

__all__ = ["backward", "forward", "refuses"]


def refuses(call, x: jax.Array, weight: QuantizedWeight) -> str | None:
  """Why this kernel cannot compute the call, or None."""
  return "no product with the transposed weight" if call.options.transposed else cpu.refuses(call, x, weight)


def forward(call, x: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """x [M, D] W -> [M, F]; weights and sums in float32."""
  return cpu.product("cpu_quantized_matmul_in_order", call, x, weight)

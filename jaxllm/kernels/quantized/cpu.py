"""Products on CPUs by the C++ kernel (`kernels/cpu/quantized.cc`), in float32; the gradient is the plain form."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels import backends, cpu_ffi, cpu_layers, matmul
from jaxllm.kernels.quantized.reference import backward
from jaxllm.kernels.quantized.weights import NF4, QuantizedWeight, dequantize

MANY = 128  # rows of bfloat16 from which a dense bfloat16 weight is made for the tile unit

__all__ = ["backward", "forward", "product", "refuses"]


def refuses(call, x: jax.Array, weight: QuantizedWeight) -> str | None:
  """Why this kernel cannot compute the call, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"activations of 16 or 32 bits only, not {x.dtype}"
  if weight.format not in ("int8", "int4", "nf4"):
    return f"int8, int4 and nf4 only, not {weight.format}"
  size = weight.group_size
  if size is not None and size < weight.padded_features and (size < 16 or size & (size - 1)):
    return f"groups of a power of two from 16, not {size}"
  if not cpu_ffi.available():
    return cpu_ffi.why_unavailable() or "the C++ kernels are switched off or did not build"
  return None


def forward(call, x: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """x [M, D] W -> [M, F]; weights and sums in float32, but of a few bfloat16 rows weights as their codes are, of many
  both in bfloat16."""
  if not cpu_layers.few_refuses(x, weight):
    return cpu_layers.few(x, weight).astype(call.options.dtype)
  if x.dtype == jnp.bfloat16 and x.shape[0] >= MANY and backends.has_bfloat16("cpu"):
    # in float32 they take several times as long
    return matmul.product(x, dequantize(weight, x.dtype), call.options.dtype)
  return product("cpu_quantized_matmul", call, x, weight)


def product(kernel: str, call, x: jax.Array, weight: QuantizedWeight) -> jax.Array:
  """x [M, D] W -> [M, F] by one of the C++ kernels, in float32."""
  padded = weight.padded_features
  rows = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padded - x.shape[1])))
  plain = weight.format == "int4" and weight.zeros is None  # zero point 8
  table = jnp.asarray(NF4 if weight.format == "nf4" else np.arange(16) - 8 * plain, jnp.float32)
  y = cpu_ffi.call(
    kernel,
    jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), jnp.float32),
    rows,
    *cpu_layers.parts(weight),
    table,
    packed=weight.packed,
    group=np.int64(weight.group_size or padded),
  )
  return y.astype(call.options.dtype)

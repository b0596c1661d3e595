"""The product in plain JAX: what every other backend is measured against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels.quantized.weights import QuantizedWeight, dequantize


def quantize_rows(x: Float[Array, "M D"], dtype) -> tuple[Array, Float[Array, " M"]]:
  """Each token's activations rounded to int8 or float8_e4m3fn, and its scale; a row of zeros gets scale 1."""
  bound = 127.0 if dtype == jnp.int8 else 448.0
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1) / bound
  scale = jnp.where(scale > 0, scale, 1.0)
  scaled = jnp.clip(x / scale[:, None], -bound, bound)
  return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), scale


def forward(call, x: Float[Array, "M D"], weight: QuantizedWeight) -> Float[Array, "M F"]:
  """x W, summed in float32 (int32 for int8 activations)."""
  dtype = call.options.dtype
  if weight.dynamic:
    xq, x_scale = quantize_rows(x, weight.values.dtype)
    wq = weight.values[:, : weight.in_features]
    total = jnp.int32 if xq.dtype == jnp.int8 else jnp.float32
    y = jax.lax.dot_general(xq, wq, (((1,), (1,)), ((), ())), preferred_element_type=total)
    return (y.astype(jnp.float32) * x_scale[:, None] * weight.scales.astype(jnp.float32)).astype(dtype)
  return jnp.matmul(x, dequantize(weight, x.dtype), preferred_element_type=jnp.float32).astype(dtype)


def backward(call, dy: Float[Array, "M F"], weight: QuantizedWeight) -> Float[Array, "M D"]:
  """dy W^T, summed in float32."""
  dx = jnp.matmul(dy, dequantize(weight, dy.dtype).T, preferred_element_type=jnp.float32)
  return dx.astype(call.options.dtype)

"""`quantized_matmul`: one function, every format, named backends."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import dispatch
from jaxllm.kernels.quantized.weights import QuantizedWeight


@dataclasses.dataclass(frozen=True)
class Options:
  """transposed: y = x W^T. dtype: of the result."""

  transposed: bool
  dtype: jnp.dtype


def _product(call, rows, weight):
  """rows W by the backend's `forward(call, x, weight)`, or rows W^T by its `backward(call, dy, weight)`."""
  return (call.module.backward if call.options.transposed else call.module.forward)(call, rows, weight)


def _backward(call, kept, d):
  weight, like = kept
  options = Options(not call.options.transposed, like.dtype)
  backend, weight = of_gradient(call.backend, weight, call.options.transposed)
  call = dataclasses.replace(call, backend=backend, options=options)
  return _product(call, d.astype(like.dtype), weight), None


def of_gradient(backend: str | None, weight: QuantizedWeight, transposed: bool) -> tuple[str | None, QuantizedWeight]:
  """What computes the gradient of a product: rounded activations are no part of it, and kernels for x W round them."""
  if not (weight.dynamic and transposed):
    return backend, weight
  return "xla", dataclasses.replace(weight, format=weight.format.removesuffix("_dynamic"))


OP = dispatch.Op(
  "quantized", _product, lambda call, x, weight: (dispatch.run(call, x, weight), (weight, x[:0])), _backward
)


def quantized_matmul(
  x: Float[Array, "*batch D"],
  weight: QuantizedWeight,
  *,
  transposed: bool = False,
  dtype: DTypeLike | None = None,
  backend: str | None = None,
  target: str | None = None,
) -> Float[Array, "*batch F"]:
  """x W for a quantized weight W [D, F], summed in float32 and returned in x's dtype; or x W^T.

  The accelerators' kernels unpack and scale the weight in registers or vector memory, tile by tile: a dense one never
  lies in memory ('xla', and the gradient on 'cpu', leave that to their compiler). Values are multiplied in x's dtype.
  With a dynamic format the activations are rounded as well, each token with its own scale, and multiplied in 8 bits.

  Differentiable in x: dx = dy W^T, with W as stored (the rounding of activations counts as the identity). Codes,
  scales and zero points are constants and get a gradient of zero.

  Args:
    weight: of `quantize` or `from_codes`, without leading axes.
    transposed: x [..., F] times W^T, and activations are not rounded: an embedding table [V, D] as the head.
    dtype: of the result, for sums that go on; None: x's.
    backend, target: as in `backends.choose`.

  Raises:
    ConfigError: the shapes disagree, or the backend cannot compute this call.

  Sources: W8A8 with a scale per token: LLM.int8 (arXiv 2208.07339), SmoothQuant (arXiv 2211.10438); NF4 and the
  gradient through a frozen weight: QLoRA (arXiv 2305.14314); 4-bit weights in registers: Marlin (arXiv 2408.11743).
  """
  inputs, outputs = weight.shape[::-1] if transposed else weight.shape
  if weight.values.ndim != 2 or x.shape[-1] != inputs:
    raise ConfigError(f"quantized_matmul takes x [..., D] and a weight [D, F]; these are {x.shape}, {weight.shape}")
  options = Options(transposed, jnp.dtype(x.dtype if dtype is None else dtype))
  call = dispatch.choose("quantized_matmul", OP, backend, target, options, x, weight)
  rows = x.reshape(-1, inputs)
  if rows.size == 0 or outputs == 0:
    return jnp.zeros((*x.shape[:-1], outputs), options.dtype)
  return dispatch.run(call, rows, weight).reshape(*x.shape[:-1], -1)

"""`quantized_matmul`: one function, every format, named backends."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends
from jaxllm.kernels.quantized.weights import QuantizedWeight

MODULES = {name: f"jaxllm.kernels.quantized.{name}" for name in ("cpu", "pallas_tpu", "mosaic_gpu")} | {
  "xla": "jaxllm.kernels.quantized.reference"
}


def quantized_matmul(
  x: Float[Array, "*batch D"],
  weight: QuantizedWeight,
  *,
  backend: str | None = None,
  target: str | None = None,
) -> Float[Array, "*batch F"]:
  """x W for a quantized weight W [D, F], summed in float32 and returned in x's dtype.

  The accelerators' kernels unpack and scale the weight in registers or vector memory, tile by tile: a dense one never
  lies in memory ('xla', and the gradient on 'cpu', leave that to their compiler). Values are multiplied in x's dtype.
  With a dynamic format the activations are rounded as well, each token with its own scale, and multiplied in 8 bits.

  Differentiable in x: dx = dy W^T, with W as stored (the rounding of activations counts as the identity). Codes,
  scales and zero points are constants and get a gradient of zero.

  Args:
    weight: of `quantize` or `from_codes`, without leading axes.
    backend: a name of `backends.BACKENDS["quantized_matmul"]`, or "auto": the first that can, for `target`.
      None: "auto" where a target is given, else "xla".
    target: the chip; None takes the backend that is named without asking the table.

  Raises:
    ConfigError: the shapes disagree, or the backend cannot compute this call.

  Sources: W8A8 with a scale per token: LLM.int8 (arXiv 2208.07339), SmoothQuant (arXiv 2211.10438); NF4 and the
  gradient through a frozen weight: QLoRA (arXiv 2305.14314); 4-bit weights in registers: Marlin (arXiv 2408.11743).
  """
  if weight.values.ndim != 2 or x.shape[-1] != weight.in_features:
    raise ConfigError(f"quantized_matmul takes x [..., D] and a weight [D, F]; these are {x.shape}, {weight.shape}")
  refuses = functools.partial(_refuses, x, weight)
  backend = backends.choose("quantized_matmul", backend, target, refuses)
  rows = x.reshape(-1, x.shape[-1])
  if rows.size == 0 or weight.shape[-1] == 0:
    return jnp.zeros((*x.shape[:-1], weight.shape[-1]), x.dtype)
  return _product(backend, target, rows, weight).reshape(*x.shape[:-1], -1)


def _refuses(x, weight, backend, target) -> str | None:
  """Why a backend cannot compute this call, or None."""
  if backend == "xla":
    return None
  if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f"activations of 16 or 32 bits only, not {x.dtype}"
  return importlib.import_module(MODULES[backend]).refuses(x, weight, target)


def _module(backend, target):
  module = importlib.import_module(MODULES[backend])
  if backend == "xla":
    return module.forward, module.backward
  return functools.partial(module.forward, target=target), functools.partial(module.backward, target=target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(backend, target, x, weight):
  return _module(backend, target)[0](x, weight)


def _forward(backend, target, x, weight):
  return _product(backend, target, x, weight), weight


def _backward(backend, target, weight, dy):
  dx = _module(backend, target)[1](dy, weight)
  zero = lambda a: (  # noqa: E731
    jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else np.zeros(a.shape, jax.dtypes.float0)
  )
  return dx, jax.tree.map(zero, weight)


_product.defvjp(_forward, _backward)

"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467) and LayerNorm (Ba et al., arXiv 1607.06450)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.kernels.elementwise import layer_norm, rms_norm
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.linear import parameter
from jaxllm.models.weights import dense


class Norm(nnx.Module):
  """Normalises the last dimension, in float32; the result has the input's dtype.

  With `heads` the dimension before it is of heads, and each has its own scale.
  """

  def __init__(self, c: ModelConfig, compute: Compute, dim: int | None = None, *, heads: int | None = None, rngs):
    dim = dim or c.embed_dim
    shape, axes = ((dim,), (None,)) if heads is None else ((heads, dim), (None, None))
    self.backend = compute.backend("elementwise") if heads is None else "xla"
    self.kind, self.eps, self.offset = c.norm, c.norm_eps, 1.0 if c.norm_unit_offset else 0.0
    init = nnx.initializers.zeros if c.norm_unit_offset else nnx.initializers.ones
    self.scale = parameter(rngs, shape, axes, init) if c.norm_affine else None
    biased = c.norm == "layernorm" and c.norm_bias and c.norm_affine
    self.bias = parameter(rngs, shape, axes, nnx.initializers.zeros) if biased else None

  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    if self.scale is None:
      scale = jnp.ones(x.shape[-1], jnp.float32)
    else:
      scale = dense(self.scale.get_value(), jnp.float32) + self.offset
    if self.kind == "rmsnorm":
      return rms_norm(x, scale, eps=self.eps, backend=self.backend)
    bias = None if self.bias is None else dense(self.bias.get_value(), jnp.float32)
    return layer_norm(x, scale, bias, eps=self.eps, backend=self.backend)

"""The feed-forward block: plain, or gated (Shazeer, arXiv 2002.05202)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.kernels.elementwise import swiglu
from jaxllm.models.config import MLPS, Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear
from jaxllm.parallel.sharding import constrain

GAIN = 1.702  # with which the sigmoid is near the normal distribution (Hendrycks and Gimpel, arXiv 1606.08415)
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * jax.nn.sigmoid(GAIN * x),
  "gelu_10": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
  "relu6": jax.nn.relu6,
  "leaky_relu": jax.nn.leaky_relu,
  "mish": jax.nn.mish,
  "tanh": jnp.tanh,
  "sigmoid": jax.nn.sigmoid,
  "hardswish": jax.nn.hard_swish,
  "laplace": functools.partial(jax.scipy.stats.norm.cdf, loc=0.707107, scale=0.282095),  # MEGA, arXiv 2209.10655
  "linear": lambda x: x,
}
CLAMP = 7.0  # of "silu_clamped"


def gated(activation: str, gate: Array, up: Array) -> Array:
  """activation(gate) * up; "silu_clamped": both clamped, a steeper sigmoid, and up + 1 (gpt-oss's code)."""
  if activation != "silu_clamped":
    return ACTIVATIONS[activation](gate) * up
  gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
  return gate * jax.nn.sigmoid(GAIN * gate) * (up + 1)


class MLP(nnx.Module):
  """down(activation(gate(x)) * up(x)), or down(activation(up(x))) when not gated."""

  def __init__(self, c: ModelConfig, compute: Compute, dim: int | None = None, *, rngs):
    dim = dim or c.mlp_dim
    self.activation, has_gate = MLPS[c.mlp]
    self.elementwise = compute.backend("elementwise")

    def linear(inputs, outputs, axes, residual=False):
      init = matrix_init(c, inputs, residual=residual)
      return Linear(inputs, outputs, axes, init=init, bias=c.mlp_bias, compute=compute, rngs=rngs)

    self.gate = linear(c.embed_dim, dim, ("embed", "mlp")) if has_gate else None
    self.up = linear(c.embed_dim, dim, ("embed", "mlp"))
    self.down = linear(dim, c.embed_dim, ("mlp", "embed"), residual=True)

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    up = checkpoint_name(constrain(self.up(x), "batch", "seq", "mlp"), "mlp_up")
    if self.gate is None:
      return self.down(ACTIVATIONS[self.activation](up))
    gate = checkpoint_name(constrain(self.gate(x), "batch", "seq", "mlp"), "mlp_gate")
    if self.activation == "silu":
      return self.down(swiglu(gate, up, backend=self.elementwise))
    return self.down(gated(self.activation, gate, up))

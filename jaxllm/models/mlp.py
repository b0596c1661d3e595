"""The feed-forward block: plain, or gated (Shazeer, arXiv 2002.05202)."""

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.kernels.elementwise import swiglu
from jaxllm.models.config import MLPS, Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear
from jaxllm.parallel.sharding import constrain

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "tanh": jax.numpy.tanh,
  "relu2": lambda x: jax.numpy.square(jax.nn.relu(x)),
  "linear": lambda x: x,
}


CLAMP, GAIN = 7.0, 1.702  # of "silu_clamped"


def gated(activation: str, gate: Array, up: Array) -> Array:
  """activation(gate) * up; "silu_clamped": both clamped, a steeper sigmoid, and up + 1 (gpt-oss's code)."""
  if activation != "silu_clamped":
    return ACTIVATIONS[activation](gate) * up
  gate, up = jax.numpy.minimum(gate, CLAMP), jax.numpy.clip(up, -CLAMP, CLAMP)
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

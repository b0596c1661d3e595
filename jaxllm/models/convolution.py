"""A convolution beside the first layer of an encoder (DeBERTa, arXiv 2006.03654: the code of its version 2, xlarge)."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear
from jaxllm.models.mlp import ACTIVATIONS
from jaxllm.models.norms import Norm


class Convolution(nnx.Module):
  """norm(layer(x) + activation(the vectors around each of x's, side by side, through one matrix))."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    self.size, self.activation = c.convolution_size, c.convolution_activation
    inputs = self.size * c.embed_dim
    init = matrix_init(c, inputs)
    self.taps = Linear(inputs, c.embed_dim, (None, "embed"), init=init, bias=True, compute=compute, rngs=rngs)
    self.norm = Norm(c, compute, rngs=rngs)

  def __call__(
    self, x: Float[Array, "B T D"], y: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None
  ) -> Float[Array, "B T D"]:
    """`x`: what the layer read. `y`: what it made of it. Beside a text's ends stand zeros."""
    places = jnp.arange(x.shape[1])

    def moved(by):
      there = (places + by >= 0) & (places + by < len(places))
      if segment_ids is not None:
        there = there & (jnp.roll(segment_ids, -by, axis=1) == segment_ids)
      return jnp.where(there[..., None], jnp.roll(x, -by, axis=1), 0)

    around = [moved(tap - self.size // 2) for tap in range(self.size)]
    return self.norm(y + ACTIVATIONS[self.activation](self.taps(jnp.concatenate(around, axis=-1))))

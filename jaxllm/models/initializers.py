"""Initial values of the weights, by the family's paper (named at `ModelConfig.init`)."""

from collections.abc import Callable

from flax import nnx

from jaxllm.models.config import ModelConfig


def matrix_init(c: ModelConfig, inputs: int, *, residual: bool = False) -> Callable:
  """The initializer of a matrix with so many inputs; `residual`: its output joins the residual stream."""
  if c.init == "fan_in":
    std = inputs**-0.5
  elif c.init == "small":
    std = 2 / (c.num_layers * c.embed_dim**0.5) if residual else (2 / (5 * c.embed_dim)) ** 0.5
  elif c.init == "gpt2" and residual:
    std = c.init_std / (2 * c.num_layers) ** 0.5
  else:
    std = c.init_std
  return nnx.initializers.normal(std)


def embedding_init(c: ModelConfig) -> Callable:
  """The initializer of token and position embeddings."""
  std = {"fan_in": c.embed_dim**-0.5, "small": (2 / (5 * c.embed_dim)) ** 0.5}.get(c.init, c.init_std)
  return nnx.initializers.normal(std)

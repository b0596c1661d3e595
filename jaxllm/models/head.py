"""What follows the layers: vocabulary logits, or labels of texts and tokens."""

import functools

from flax import nnx
from jaxtyping import Array, Float

from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear, parameter
from jaxllm.models.mlp import ACTIVATIONS
from jaxllm.models.norms import Norm


class Head(nnx.Module):
  """A dense layer and a norm where the config has them, a matrix unless it is the embedding's, and a bias."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    D = c.embed_dim
    outputs, axis = (c.vocab_size, "vocab") if c.head == "lm" else (c.num_labels, None)
    init = matrix_init(c, D)
    self.activation = c.head_dense
    dense = functools.partial(Linear, D, D, ("embed", None), init=init, bias=c.mlp_bias, compute=compute, rngs=rngs)
    self.dense = None if c.head_dense is None else dense()
    self.norm = Norm(c, compute, rngs=rngs) if c.head_norm else None
    self.axes = ("embed", axis)
    matrix = c.head in ("sequence", "token") or (c.head == "lm" and not c.tie_embeddings)
    self.weight = parameter(rngs, (D, outputs), self.axes, init) if matrix else None
    self.bias = parameter(rngs, (outputs,), (axis,), nnx.initializers.zeros) if c.head_bias else None

  def transform(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What the matrix multiplies."""
    if self.dense is not None:
      x = ACTIVATIONS[self.activation](self.dense(x))
    return x if self.norm is None else self.norm(x)

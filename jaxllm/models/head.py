"""What follows the layers: vocabulary logits, or labels of texts and tokens; and the log-probability of a token.

A token's log-probability is its logit less the log-sum-exp of all, in float32. Objectives have it from hidden states,
without holding logits (`token_log_probs`), the engine from the logits that it draws from (`log_probs`). Where
`compute.batch_invariant` is set the two are the same to the bit.
"""

import functools
from typing import Any, Protocol

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxllm.kernels.elementwise import log_softmax
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear, parameter
from jaxllm.models.mlp import ACTIVATIONS
from jaxllm.models.norms import Norm
from jaxllm.models.weights import dense
from jaxllm.parallel import head_loss


class Head(nnx.Module):
  """A dense layer and a norm where the config has them, a matrix unless it is the embedding's, and a bias."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    D = c.head_input_dim
    outputs, axis = (c.vocab_size, "vocab") if c.head == "lm" else (c.num_labels, None)
    init = matrix_init(c, D)
    self.activation = c.head_dense
    sizes, bias = (c.embed_dim, D), c.has_dense_bias
    dense = functools.partial(Linear, *sizes, ("embed", None), init=init, bias=bias, compute=compute, rngs=rngs)
    self.dense = None if c.head_dense is None else dense()
    self.norm = Norm(c, compute, D, rngs=rngs) if c.head_norm else None
    self.axes = ("embed", axis)
    matrix = c.head in ("sequence", "token", "span") or (c.head == "lm" and not c.tie_embeddings)
    self.weight = parameter(rngs, (D, outputs), self.axes, init) if matrix else None
    self.bias = parameter(rngs, (outputs,), (axis,), nnx.initializers.zeros) if c.head_bias else None

  def transform(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What the matrix multiplies."""
    if self.dense is not None:
      x = ACTIVATIONS[self.activation](self.dense(x))
    return x if self.norm is None else self.norm(x)


class LanguageModel(Protocol):
  """What log-probabilities follow from: a `jaxllm.models.transformer.Transformer`."""

  config: ModelConfig
  compute: Compute

  def head_input(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]: ...

  def head_weight(self) -> tuple[Any, bool]: ...

  def head_bias(self) -> Float[Array, " V"] | None: ...


def head_matrix(model: LanguageModel) -> tuple[Array, dict[str, Any]]:
  """The head's matrix as it lies, and what else a function of `jaxllm.parallel.head_loss` wants to know."""
  weight, transposed = model.head_weight()
  return dense(weight), {
    "bias": model.head_bias(),
    "softcap": model.config.logit_softcap,
    "transposed": transposed,
    "backend": model.compute.cross_entropy,
    "target": model.compute.target,
  }


def token_log_probs(
  model: LanguageModel,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
  """The log-probability of each target where `mask` holds, 0 elsewhere; logits are never held whole."""
  head, options = head_matrix(model)
  return head_loss.token_log_probs(model.head_input(hidden), head, targets, mask=mask, **options)[0]


def log_probs(model: LanguageModel, logits: Float[Array, "N V"]) -> Float[Array, "N V"]:
  """The log-probabilities of all tokens, of the model's float32 logits (`Transformer.logits`)."""
  return log_softmax(logits, backend=model.compute.backend("elementwise"))

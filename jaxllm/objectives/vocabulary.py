"""Log-probabilities over the vocabulary, from hidden states on: what the language-modelling objectives share."""

from typing import Any

from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.transformer import Transformer
from jaxllm.models.weights import dense
from jaxllm.objectives.base import Batch, Loss
from jaxllm.parallel import head_loss


def vocabulary_loss(model: Transformer, hidden: Float[Array, "B T D"], batch: Batch, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of `batch["targets"]`, summed with `batch["loss_weights"]`; logits are never held whole.

  Args:
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
  """
  head, options = _head(model)
  sums = head_loss.cross_entropy(
    model.head_input(hidden), head, batch["targets"], batch["loss_weights"], z_loss=z_loss, **options
  )
  weight = sums.weight_sum
  metrics = {"accuracy": (sums.correct_sum, weight), "nll": (sums.loss_sum - sums.z_loss_sum, weight)}
  if z_loss:
    metrics["z_loss"] = (sums.z_loss_sum, weight)
  return Loss(sums.loss_sum, weight, metrics)


def token_log_probs(
  model: Transformer, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
  """The log-probability of each target where `mask` holds, 0 elsewhere; logits are never held whole."""
  head, options = _head(model)
  return head_loss.token_log_probs(model.head_input(hidden), head, targets, mask=mask, **options)[0]


def _head(model: Transformer) -> tuple[Array, dict[str, Any]]:
  """The head's matrix as it lies, and what else a function of `head_loss` wants to know."""
  weight, transposed = model.head_weight()
  return dense(weight), {
    "bias": model.head_bias(),
    "softcap": model.config.logit_softcap,
    "transposed": transposed,
    "backend": model.compute.cross_entropy,
    "target": model.compute.target,
  }

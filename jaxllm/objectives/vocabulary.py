"""The loss over the vocabulary, from hidden states on: what the language-modelling objectives share."""

from jaxtyping import Array, Float

from jaxllm.models.head import head_matrix
from jaxllm.models.transformer import Transformer
from jaxllm.objectives.base import Batch, Loss
from jaxllm.parallel import head_loss


def vocabulary_loss(model: Transformer, hidden: Float[Array, "B T D"], batch: Batch, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of `batch["targets"]`, summed with `batch["loss_weights"]`; logits are never held whole.

  Args:
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
  """
  head, options = head_matrix(model)
  sums = head_loss.cross_entropy(
    model.head_input(hidden), head, batch["targets"], batch["loss_weights"], z_loss=z_loss, **options
  )
  weight = sums.weight_sum
  metrics = {"accuracy": (sums.correct_sum, weight), "nll": (sums.loss_sum - sums.z_loss_sum, weight)}
  if z_loss:
    metrics["z_loss"] = (sums.z_loss_sum, weight)
  return Loss(sums.loss_sum, weight, metrics)

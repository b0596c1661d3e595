"""Cross-entropy over the vocabulary, from hidden states on: what the language-modelling objectives share."""

from jaxtyping import Array, Float

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.base import Batch, Loss
from jaxllm.parallel.head_loss import cross_entropy


def vocabulary_loss(model: Transformer, hidden: Float[Array, "B T D"], batch: Batch, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of `batch["targets"]`, summed with `batch["loss_weights"]`; logits are never held whole.

  Args:
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
  """
  hidden = model.head_input(hidden)
  head, transposed, compute = model.head_weight(), model.config.tie_embeddings, model.compute
  if transposed:  # as it lies in memory
    head = head.T
  sums = cross_entropy(
    hidden,
    head,
    batch["targets"],
    batch["loss_weights"],
    bias=model.head_bias(),
    z_loss=z_loss,
    softcap=model.config.logit_softcap,
    transposed=transposed,
    backend=compute.cross_entropy,
    target=compute.target,
  )
  weight = sums.weight_sum
  metrics = {"accuracy": (sums.correct_sum, weight), "nll": (sums.loss_sum - sums.z_loss_sum, weight)}
  if z_loss:
    metrics["z_loss"] = (sums.z_loss_sum, weight)
  return Loss(sums.loss_sum, weight, metrics)

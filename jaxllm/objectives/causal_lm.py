"""Next-token prediction: the objective of pretraining, and of fine-tuning through its loss weights."""

import jax

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.vocabulary import Batch, Loss, vocabulary_loss


def causal_lm(model: Transformer, batch: Batch, key: jax.Array | None = None, *, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of every target token, summed with its loss weight.

  Args:
    model: a merged `Transformer`.
    batch: packed documents; segment 0 is padding.
    key: unused, the objective is deterministic.
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).

  A model with experts adds the losses of its routers, which are those of this batch (of each micro-batch,
  where gradients are accumulated), times the weights in its config and the sum of loss weights.

  Returns:
    The sum of weighted losses in nats, the sum of weights, and further metrics as such pairs.
  """
  del key
  hidden, _, router = model.hidden_and_router(
    batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
  )
  loss_sum, weight, metrics = vocabulary_loss(model, hidden, batch, z_loss)
  if router is not None:
    moe = model.config.moe
    loss_sum += weight * (moe.load_balance_weight * router["load_balance"] + moe.z_weight * router["z"])
    metrics |= {f"moe/{name}": (weight * value, weight) for name, value in router.items()}
  return loss_sum, weight, metrics

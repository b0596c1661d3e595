"""Next-token prediction: the objective of pretraining, and of fine-tuning through its loss weights."""

import dataclasses
from typing import ClassVar

from jaxllm.base.ranges import Amount
from jaxllm.objectives.base import Loss, Objective
from jaxllm.objectives.vocabulary import vocabulary_loss


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
  """Cross-entropy of every target token, summed with its loss weight.

  Batch: packed documents; segment 0 is padding. A model with experts adds the losses of its routers, which are those
  of this batch (of each micro-batch, where gradients are accumulated), times the weights in its config and the sum of
  loss weights.
  """

  name: ClassVar[str] = "causal_lm"
  architectures: ClassVar = ("decoder",)
  heads_and_tasks: ClassVar = (("lm", "text"), ("lm", "chat"))
  routers: ClassVar[bool] = True
  writes_text: ClassVar[bool] = True

  z_loss: Amount = 0.0  # weight of log(Z)^2 (PaLM, arXiv 2204.02311, section 5)

  def __call__(self, models, batch, key=None) -> Loss:
    model = models["policy"]
    hidden, _, router = model.hidden_and_router(
      batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
    )
    total, weight, metrics = vocabulary_loss(model, hidden, batch, self.z_loss)
    if router is not None:
      moe = model.config.moe
      total += weight * (moe.load_balance_weight * router["load_balance"] + moe.z_weight * router["z"])
      metrics |= {f"moe/{name}": (weight * value, weight) for name, value in router.items()}
    return Loss(total, weight, metrics)

"""Masked language modelling: the objective of encoders (Devlin et al., arXiv 1810.04805, section 3.1)."""

import dataclasses
from typing import ClassVar

from jaxllm.base.ranges import Amount
from jaxllm.objectives.base import Loss, Objective
from jaxllm.objectives.vocabulary import vocabulary_loss


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
  """Cross-entropy of the chosen tokens: `inputs` are masked, `targets` the text, `loss_weights` 1 where chosen.

  What is masked was drawn with the data.
  """

  name: ClassVar[str] = "masked_lm"
  architectures: ClassVar = ("encoder",)
  heads_and_tasks: ClassVar = (("lm", "masking"),)

  z_loss: Amount = 0.0  # weight of log(Z)^2

  def __call__(self, models, batch, key=None) -> Loss:
    model = models["policy"]
    hidden, _ = model.hidden(batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"))
    return vocabulary_loss(model, hidden, batch, self.z_loss)

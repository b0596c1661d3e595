"""Writing one text after reading another: T5, BART, and their fine-tuning."""

import dataclasses
from typing import ClassVar

from jaxllm.base.ranges import Amount
from jaxllm.objectives.base import Loss, Objective
from jaxllm.objectives.vocabulary import vocabulary_loss


@dataclasses.dataclass(frozen=True)
class Seq2Seq(Objective):
  """Cross-entropy of the decoder's targets, given the encoder's tokens and the targets before.

  Batch: besides the decoder's entries [B, T] `encoder_inputs, encoder_positions, encoder_segment_ids` [B, S]. A segment
  of the decoder sees the encoder's segment of the same number.
  """

  name: ClassVar[str] = "seq2seq"
  architectures: ClassVar = ("encoder_decoder",)
  heads_and_tasks: ClassVar = (("lm", "span_corruption"), ("lm", "denoising"), ("lm", "pairs"))

  z_loss: Amount = 0.0  # weight of log(Z)^2

  def __call__(self, models, batch, key=None) -> Loss:
    model, segments = models["policy"], batch.get("encoder_segment_ids")
    encoded = model.encode(batch["encoder_inputs"], positions=batch.get("encoder_positions"), segment_ids=segments)
    hidden, _ = model.hidden(
      batch["inputs"],
      positions=batch.get("positions"),
      segment_ids=batch.get("segment_ids"),
      encoded=encoded,
      encoded_segment_ids=segments,
    )
    return vocabulary_loss(model, hidden, batch, self.z_loss)

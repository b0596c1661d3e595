"""Writing one text after reading another: T5, BART, and their fine-tuning."""

import jax

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.vocabulary import Batch, Loss, vocabulary_loss


def seq2seq(model: Transformer, batch: Batch, key: jax.Array | None = None, *, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of the decoder's targets, given the encoder's tokens and the targets before.

  Args:
    batch: besides the decoder's entries [B, T] `encoder_inputs, encoder_positions, encoder_segment_ids` [B, S].
      A segment of the decoder sees the encoder's segment of the same number.
    key: unused, the objective is deterministic.

  Returns as `causal_lm` does.
  """
  del key
  segments = batch.get("encoder_segment_ids")
  encoded = model.encode(batch["encoder_inputs"], positions=batch.get("encoder_positions"), segment_ids=segments)
  hidden, _ = model.hidden(
    batch["inputs"],
    positions=batch.get("positions"),
    segment_ids=batch.get("segment_ids"),
    encoded=encoded,
    encoded_segment_ids=segments,
  )
  return vocabulary_loss(model, hidden, batch, z_loss)

"""Masked language modelling: the objective of encoders (Devlin et al., arXiv 1810.04805, section 3.1)."""

import jax

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.vocabulary import Batch, Loss, vocabulary_loss


def masked_lm(model: Transformer, batch: Batch, key: jax.Array | None = None, *, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of the chosen tokens: `inputs` are masked, `targets` the text, `loss_weights` 1 where chosen.

  `key` is unused: what is masked was drawn with the data. Returns as `causal_lm` does.
  """
  del key
  hidden, _ = model.hidden(batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"))
  return vocabulary_loss(model, hidden, batch, z_loss)

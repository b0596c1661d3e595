"""Labels of texts, or of each token."""

import jax
import jax.numpy as jnp

from jaxllm.models.transformer import Transformer
from jaxllm.objectives.vocabulary import Batch, Loss


def classification(model: Transformer, batch: Batch, key: jax.Array | None = None, *, z_loss: float = 0.0) -> Loss:
  """Cross-entropy of the labels.

  Args:
    batch: `inputs, positions, segment_ids, token_types` [B, T]; `targets` and `loss_weights` [B] for a model with
      a head for texts, [B, T] with one for tokens.
    key: unused, the objective is deterministic.
    z_loss: weight of the squared log-partition.

  Returns as `causal_lm` does. The metric `f1` is 2 TP / (2 TP + FP + FN) of each class that occurs, as target
  or as prediction; its mean is the macro F1.
  """
  del key
  segments, types = batch.get("segment_ids"), batch.get("token_types")
  hidden, _ = model.hidden(
    batch["inputs"],
    positions=batch.get("positions"),
    segment_ids=segments,
    token_types=types if model.config.num_token_types > 1 else None,
  )
  logits, targets, weights = model.classify(hidden, segments), batch["targets"], batch["loss_weights"]
  log_z = jax.nn.logsumexp(logits, axis=-1)
  nll = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  total, weight = (nll * weights).sum(), weights.sum()
  z_term = z_loss * (log_z**2 * weights).sum()

  classes = jnp.arange(logits.shape[-1])
  true, guessed = targets[..., None] == classes, logits.argmax(-1)[..., None] == classes
  true_positive, seen = (
    (found * weights[..., None]).reshape(-1, len(classes)).sum(0) for found in (true & guessed, true * 1 + guessed)
  )
  metrics = {"accuracy": (true_positive.sum(), weight), "nll": (total, weight), "f1": (2 * true_positive, seen)}
  if z_loss:
    metrics["z_loss"] = (z_term, weight)
  return total + z_term, weight, metrics

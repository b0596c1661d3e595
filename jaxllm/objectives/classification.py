"""Labels of texts, or of each token."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Amount
from jaxllm.objectives.base import Loss, Objective


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
  """Cross-entropy of the labels.

  Batch: `inputs, positions, segment_ids, token_types` [B, T]; `targets` and `loss_weights` [B] for a model with a head
  for texts, [B, T] with one for tokens. The metric `f1` is 2 TP / (2 TP + FP + FN) of each class that occurs, as target
  or as prediction; its mean is the macro F1.
  """

  name: ClassVar[str] = "classification"
  architectures: ClassVar = ("encoder", "decoder")
  heads_and_tasks: ClassVar = (("sequence", "classification"), ("token", "token_classification"))

  z_loss: Amount = 0.0  # weight of log(Z)^2

  def check(self, model, data):
    super().check(model, data)
    if len(data.labels) > model.num_labels:
      raise ConfigError(f"data.labels names {len(data.labels)} classes, model.num_labels is {model.num_labels}")

  def __call__(self, models, batch, key=None) -> Loss:
    model = models["policy"]
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
    z_term = self.z_loss * (log_z**2 * weights).sum()

    classes = jnp.arange(logits.shape[-1])
    true, guessed = targets[..., None] == classes, logits.argmax(-1)[..., None] == classes
    true_positive, seen = (
      (found * weights[..., None]).reshape(-1, len(classes)).sum(0) for found in (true & guessed, true * 1 + guessed)
    )
    metrics = {"accuracy": (true_positive.sum(), weight), "nll": (total, weight), "f1": (2 * true_positive, seen)}
    if self.z_loss:
      metrics["z_loss"] = (z_term, weight)
    return Loss(total + z_term, weight, metrics)

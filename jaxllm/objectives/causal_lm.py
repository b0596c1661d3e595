"""Next-token prediction: the objective of pretraining, and of fine-tuning through its loss weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import backends
from jaxllm.kernels.cross_entropy import cross_entropy
from jaxllm.models.transformer import Transformer

Batch = dict[str, Array]  # inputs, targets, positions, segment_ids, loss_weights; each [B, T]
Sum = Float[Array, ""]


def causal_lm(
  model: Transformer, batch: Batch, key: jax.Array | None = None, *, z_loss: float = 0.0
) -> tuple[Sum, Sum, dict[str, tuple[Sum, Sum]]]:
  """Cross-entropy of every target token, summed with its loss weight.

  Args:
    model: a merged `Transformer`.
    batch: packed documents; segment 0 is padding.
    key: unused, the objective is deterministic.
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).

  Returns:
    The sum of weighted losses in nats, the sum of weights, and further metrics as such pairs.
  """
  del key
  hidden, _ = model.hidden(
    batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids")
  )
  compute = model.compute
  result = cross_entropy(
    hidden,
    model.head_weight(),
    batch["targets"],
    batch["loss_weights"],
    bias=model.head_bias(),
    z_loss=z_loss,
    softcap=model.config.logit_softcap,
    backend=backends.choose("cross_entropy", compute.cross_entropy, compute.target),
  )
  weight = result.weight_sum
  metrics = {"accuracy": (result.correct_sum, weight), "nll": (result.nll_sum, weight)}
  if z_loss:
    metrics["z_loss"] = (z_loss * result.z_sum, weight)
  return result.nll_sum + z_loss * result.z_sum, weight, metrics


def per_token_nll(model: Transformer, batch: Batch) -> Float[Array, "B T"]:
  """The loss of each target in nats, zero where its weight is; for evaluation."""
  logits, _ = model(batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"))
  log_probabilities = jax.nn.log_softmax(logits, axis=-1)
  nll = -jnp.take_along_axis(log_probabilities, batch["targets"][..., None], axis=-1)[..., 0]
  return jnp.where(batch["loss_weights"] > 0, nll * batch["loss_weights"], 0.0)

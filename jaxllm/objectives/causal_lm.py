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
  hidden, _ = model.hidden(batch["inputs"], positions=batch.get("positions"), segment_ids=batch.get("segment_ids"))
  head, layout, compute = model.head_weight(), "dv", model.compute
  if model.config.tie_embeddings:  # as it lies in memory
    head, layout = head.T, "vd"
  if (bias := model.head_bias()) is not None:  # one more input that is always 1
    hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], axis=-1)
    head = jnp.concatenate([head, bias[:, None] if layout == "vd" else bias[None]], axis=1 if layout == "vd" else 0)
  sums = cross_entropy(
    hidden,
    head,
    batch["targets"],
    batch["loss_weights"],
    z_loss=z_loss,
    softcap=model.config.logit_softcap,
    head_layout=layout,
    backend=backends.choose("cross_entropy", compute.cross_entropy, compute.target),
  )
  weight = sums.weight_sum
  metrics = {"accuracy": (sums.correct_sum, weight), "nll": (sums.loss_sum - sums.z_loss_sum, weight)}
  if z_loss:
    metrics["z_loss"] = (sums.z_loss_sum, weight)
  return sums.loss_sum, weight, metrics

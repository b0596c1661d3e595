"""Placeholder of the fused head and loss."""
import dataclasses
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  nll_sum: jax.Array
  weight_sum: jax.Array
  z_sum: jax.Array
  correct_sum: jax.Array


def cross_entropy(x, head, targets, weights, *, bias=None, z_loss=0.0, softcap=None, backend="xla"):
  logits = (x @ head.astype(x.dtype)).astype(jnp.float32)
  if bias is not None:
    logits += bias
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  lse = jax.nn.logsumexp(logits, -1)
  nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  z = jnp.where(weights > 0, jnp.square(lse) * weights, 0).sum()
  correct = jnp.where(weights > 0, (logits.argmax(-1) == targets) * weights, 0).sum()
  return CrossEntropy(jnp.where(weights > 0, nll * weights, 0).sum(), weights.sum(), z, correct)

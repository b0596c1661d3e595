"""A toy language model with the parameter tree of the real ones: embedding, stacked blocks, norms, head."""

import jax
import jax.numpy as jnp
import numpy as np

V, D, F, L = 24, 16, 32, 3


def toy_params(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)  # noqa: E731
  return {
    "embedding": {"tokens": normal(V, D)},
    "blocks": {
      "mlp": {"up": normal(L, D, F), "down": normal(L, F, D)},
      "mlp_norm": {"scale": 1 + normal(L, D), "bias": normal(L, D)},
    },
    "head": {"kernel": normal(D, V)},
  }


def toy_batch(batch=16, length=6, seed=0, weights=None):
  rng = np.random.default_rng(seed)
  return {
    "inputs": jnp.asarray(rng.integers(0, V, (batch, length)), jnp.int32),
    "targets": jnp.asarray(rng.integers(0, V, (batch, length)), jnp.int32),
    "loss_weights": jnp.asarray(
      rng.integers(0, 2, (batch, length)) * rng.exponential(size=(batch, 1))  # uneven on purpose
      if weights is None
      else np.broadcast_to(weights, (batch, length)),
      jnp.float32,
    ),
  }


def toy_loss(params, batch, key):
  """Cross-entropy: (loss_sum, weight_sum, metrics)."""
  del key

  def block(x, layer):
    h = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)
    h = h * layer["mlp_norm"]["scale"] + layer["mlp_norm"]["bias"]
    return x + jax.nn.silu(h @ layer["mlp"]["up"]) @ layer["mlp"]["down"], None

  x, _ = jax.lax.scan(block, params["embedding"]["tokens"][batch["inputs"]], params["blocks"])
  logits = (x @ params["head"]["kernel"]).astype(jnp.float32)
  weights = batch["loss_weights"]
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
  correct = (logits.argmax(-1) == batch["targets"]) * weights
  return (
    -(picked * weights).sum(),
    weights.sum(),
    {
      "accuracy": (correct.sum(), weights.sum()),
      "tokens": (weights > 0).sum().astype(jnp.float32),
    },
  )

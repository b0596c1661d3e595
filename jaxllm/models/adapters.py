"""Places in a block for what is no weight: small blocks after its parts, and virtual tokens that all tokens see.

`ModelConfig.adapter` opens them. Fresh, they change nothing (the small blocks) or little (the virtual tokens).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.linear import Linear, parameter


class Bottleneck(nnx.Module):
  """h + up(gelu(down(h))) after attention or feed-forward (Houlsby et al., arXiv 1902.00751)."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    D, dim, small = c.embed_dim, c.adapter.bottleneck_dim, nnx.initializers.normal(0.01)
    self.down = Linear(D, dim, ("embed", None), init=small, bias=True, compute=compute, rngs=rngs)
    self.up = Linear(dim, D, (None, "embed"), init=nnx.initializers.zeros, bias=True, compute=compute, rngs=rngs)

  def __call__(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return h + self.up(jax.nn.gelu(self.down(h)))


class Prefix(nnx.Module):
  """Keys and values of virtual tokens, which every token of every segment sees (Li and Liang, arXiv 2101.00190)."""

  def __init__(self, c: ModelConfig, *, rngs):
    shape, axes = (c.adapter.prefix_len, c.num_kv_heads, c.head_dim), (None, "kv_heads", None)
    self.key = parameter(rngs, shape, axes, nnx.initializers.normal(c.init_std))
    self.value = parameter(rngs, shape, axes, nnx.initializers.normal(c.init_std))

  def join(
    self,
    query: Float[Array, "B T N H"],
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    *,
    scale: float | None,
    softcap: float | None,
  ) -> Float[Array, "B T N H"]:
    """The attention `out`, whose scores have this log-sum-exp, as it is with the virtual tokens among the keys."""
    key, value = (array[...].astype(jnp.float32) for array in (self.key, self.value))
    grouped = query.reshape(*query.shape[:2], key.shape[1], -1, query.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("BTKGH,PKH->BKGTP", grouped, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
      scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(lse.shape[0], -1, *scores.shape[-2:])  # [B, N, T, P]
    total = jnp.logaddexp(lse, jax.nn.logsumexp(scores, axis=-1))
    share = jnp.exp(scores - total[..., None]).reshape(len(scores), key.shape[1], -1, *scores.shape[2:])
    virtual = jnp.einsum("BKGTP,PKH->BTKGH", share, value).reshape(query.shape)
    rest = jnp.exp(lse - total).swapaxes(1, 2)[..., None]
    return (out.astype(jnp.float32) * rest + virtual).astype(out.dtype)


def is_place(path: str) -> bool:
  """Whether a parameter belongs to a place that `ModelConfig.adapter` opens."""
  return any(name.endswith("_adapter") or name == "prefix" for name in path.split("/"))

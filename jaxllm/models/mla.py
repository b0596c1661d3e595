"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

import dataclasses
import math

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.models import positions as pos
from jaxllm.models.attention import Placement
from jaxllm.models.caches import Cache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear
from jaxllm.models.norms import Norm
from jaxllm.models.stores import AttentionOptions
from jaxllm.models.weights import dense
from jaxllm.parallel.sharding import constrain


class LatentAttention(nnx.Module):
  """Attention whose keys and values are made from one short vector per token.

  Training makes them. A cache keeps that vector (and the rotated part of the keys, which all heads
  share) in place of keys and values, and moves the two matrices that would expand it over to the queries
  and to the outputs: attention with a single key/value head of kv_lora_rank + rope_head_dim dimensions.
  """

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    self.c, self.a = c, c.mla
    self.kernel, self.target = compute.attention, compute.target
    self.elementwise = compute.backend("elementwise")
    D, N, R, rank = c.embed_dim, c.num_heads, c.mla.kv_lora_rank, c.mla.q_lora_rank

    def linear(inputs, outputs, axes, bias=False, residual=False):
      init = matrix_init(c, inputs, residual=residual)
      return Linear(inputs, outputs, axes, init=init, bias=bias, compute=compute, rngs=rngs)

    short = c if c.mla.norm_eps is None else dataclasses.replace(c, norm_eps=c.mla.norm_eps)
    if rank is not None:
      self.query_down = linear(D, rank, ("embed", None), c.attention_bias)
      self.query_norm = Norm(short, compute, rank, rngs=rngs)
      self.query_up = linear(rank, N * c.head_dim, (None, "heads"))
    else:
      self.query = linear(D, N * c.head_dim, ("embed", "heads"))
    self.latent = linear(D, R + c.mla.rope_head_dim, ("embed", None), c.attention_bias)
    self.latent_norm = Norm(short, compute, R, rngs=rngs)
    self.key = linear(R, N * c.mla.nope_head_dim, (None, "heads"))
    self.value = linear(R, N * c.mla.value_head_dim, (None, "heads"))
    self.output = linear(N * c.mla.value_head_dim, D, ("heads", "embed"), c.attention_out_bias, residual=True)

  def __call__(
    self, x: Float[Array, "B T D"], place: Placement, kind: str, layer: int, cache: Cache
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """As `Attention`; what is kept of a token is its latent and the rotated part, side by side."""
    N, R = self.c.num_heads, self.a.kv_lora_rank
    heads = lambda y: y.reshape(*y.shape[:2], N, -1)  # noqa: E731
    rotate = lambda y: pos.apply_rope(y, place.rope[kind], backend=self.elementwise)  # noqa: E731
    low_rank = self.a.q_lora_rank is not None
    query = self.query_up(self.query_norm(self.query_down(x))) if low_rank else self.query(x)
    query = constrain(heads(query), "batch", "seq", "heads", None)
    plain, rotated = query[..., : self.a.nope_head_dim], rotate(query[..., self.a.nope_head_dim :])
    latent = self.latent(x)
    shared = rotate(latent[:, :, None, R:])
    latent = self.latent_norm(latent[..., :R])

    def expand():
      key, value = heads(self.key(latent)), heads(self.value(latent))
      key = jnp.concatenate([key, jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))], axis=-1)
      query = checkpoint_name(jnp.concatenate([plain, rotated], axis=-1), "query")
      key = checkpoint_name(constrain(key, "batch", None, "heads", None), "key")
      return query, key, checkpoint_name(constrain(value, "batch", None, "heads", None), "value")

    def matrix(linear):
      return dense(linear.weight.get_value(), x.dtype).reshape(R, N, -1)

    def absorb():
      query = jnp.concatenate([jnp.einsum("BTNH,RNH->BTNR", plain, matrix(self.key)), rotated], axis=-1)
      return query, jnp.concatenate([latent[:, :, None], shared], axis=-1)

    def finish(out):
      return jnp.einsum("BTNR,RNH->BTNH", out, matrix(self.value))

    options = AttentionOptions(scale=softmax_scale(self.c), backend=self.kernel, target=self.target)
    out, cache = cache.attend_latent(layer, expand, absorb, finish, options)
    out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")
    return self.output(out), cache


def softmax_scale(c: ModelConfig) -> float:
  """The factor on the scores: YaRN's temperature applies to all dimensions of a head, not only the rotated."""
  scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale
  scaling = c.rope_scaling
  if scaling is None or not scaling.mscale_all_dim or scaling.factor <= 1:
    return scale
  return scale * (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0) ** 2

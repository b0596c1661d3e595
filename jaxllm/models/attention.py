"""Self- and cross-attention with grouped key/value heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxllm.kernels import Visibility
from jaxllm.models import positions as pos
from jaxllm.models.adapters import Prefix
from jaxllm.models.caches import Cache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear, parameter
from jaxllm.models.norms import Norm
from jaxllm.models.stores import AttentionOptions
from jaxllm.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the tokens of a batch stand; computed once, used by every layer."""

  rope: dict[str, tuple[Array, Array]]  # layer kind -> cos and sin [B, T, rotary_dim / 2]
  bias: Float[Array, "#B N T S"] | None = None  # of the scores, where positions are relative
  # of a disentangled bias: the vectors [2 R, D] of distances, and which of them stands between two tokens [T, T]
  distances: tuple[Array, Array] | None = None


class Attention(nnx.Module):
  """softmax(q k^T) v with the config's heads, positions, norms and window."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    self.c = c
    self.kernel, self.target = compute.attention, compute.target
    self.elementwise = compute.backend("elementwise")
    D, H = c.embed_dim, c.head_dim
    N, K = c.num_heads, c.num_kv_heads

    def linear(inputs, outputs, axes, bias, residual=False):
      init = matrix_init(c, inputs, residual=residual)
      return Linear(inputs, outputs, axes, init=init, bias=bias, compute=compute, rngs=rngs)

    self.query = linear(D, N * H, ("embed", "heads"), c.attention_bias)
    self.key = linear(D, K * H, ("embed", "kv_heads"), c.attention_bias)
    self.value = linear(D, K * H, ("embed", "kv_heads"), c.attention_bias)
    self.output = linear(N * H, D, ("heads", "embed"), c.attention_out_bias, residual=True)
    if c.qk_norm != "none":
      full = c.qk_norm == "full"
      own = c.qk_norm == "heads"
      self.query_norm = Norm(c, compute, N * H if full else H, heads=N if own else None, rngs=rngs)
      self.key_norm = Norm(c, compute, K * H if full else H, heads=K if own else None, rngs=rngs)
    self.prefix = Prefix(c, rngs=rngs) if c.adapter is not None and c.adapter.prefix_len else None
    if c.attention_sinks:
      self.sinks = parameter(rngs, (N,), ("heads",), nnx.initializers.zeros)

  def __call__(
    self, x: Float[Array, "B T D"], place: Placement, kind: str, layer: int, cache: Cache
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Attends to what the cache shows of this call's tokens and those before; returns it with this call's."""
    c = self.c
    query, key, value = self.query(x), self.key(x), self.value(x)
    if c.qkv_clip is not None:
      query, key, value = (jnp.clip(y, -c.qkv_clip, c.qkv_clip) for y in (query, key, value))
    if c.qk_norm == "full":
      query, key = self.query_norm(query), self.key_norm(key)
    query, key, value = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (query, key, value))
    if c.qk_norm in ("head", "heads"):
      query, key = self.query_norm(query), self.key_norm(key)
    if c.position == "rope" and kind != "nope":
      query, key = (pos.apply_rope(y, place.rope[kind], backend=self.elementwise) for y in (query, key))
    query = checkpoint_name(constrain(query, "batch", "seq", "heads", None), "query")
    key = checkpoint_name(constrain(key, "batch", None, "kv_heads", None), "key")
    value = checkpoint_name(constrain(value, "batch", None, "kv_heads", None), "value")
    options = AttentionOptions(
      visibility=Visibility(
        causal=c.architecture != "encoder",
        window=c.sliding_window if kind == "local" else None,
        sink_tokens=c.sink_tokens if kind == "local" else 0,
      ),
      scale=c.query_scale,
      softcap=c.attention_softcap,
      sinks=self.sinks[...] if c.attention_sinks else None,
      alibi_slopes=jnp.asarray(c.alibi_scale * pos.alibi_slopes(c.num_heads)) if c.position == "alibi" else None,
      bias=place.bias if place.distances is None else self._disentangled(query, key, *place.distances),
      return_lse=self.prefix is not None,
      backend=self.kernel,
      target=self.target,
    )
    out, cache = cache.attend(layer, query, key, value, options)
    if self.prefix is not None:
      out = self.prefix.join(query, *out, scale=options.scale, softcap=options.softcap)
    out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")
    return self.output(out), cache

  def _disentangled(
    self, query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], vectors: Float[Array, "R D"], which
  ) -> Float[Array, "B N T T"]:
    """What content and distance add to scores, in float32: the query by the distance's key, and the key by the
    distance's query (DeBERTa, arXiv 2006.03654, equation 4, with one set of projections as in v2)."""
    c = self.c
    own_query, own_key = (f(vectors[None]).reshape(-1, c.num_heads, c.head_dim) for f in (self.query, self.key))
    pick = lambda products, index: jnp.take_along_axis(products, index[None, None], axis=-1)  # noqa: E731
    product = functools.partial(jnp.einsum, "BTNH,RNH->BNTR", preferred_element_type=jnp.float32)
    bias = pick(product(query, own_key), which) + jnp.swapaxes(pick(product(key, own_query), which.T), -1, -2)
    return bias * (c.head_dim**-0.5 if c.query_scale is None else c.query_scale)


class CrossAttention(Attention):
  """softmax(q k^T) v with the keys and values of an encoder's states: no positions, no causal order."""

  def __call__(  # type: ignore[override]
    self, x: Float[Array, "B T D"], layer: int, cache: Cache
  ) -> tuple[Float[Array, "B T D"], Cache]:
    """Attends to the encoder's states, or to their keys and values, as the cache has them."""
    c = self.c
    heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
    query = constrain(heads(self.query(x)), "batch", "seq", "heads", None)

    def keys_values(states):
      key, value = (heads(linear(states)) for linear in (self.key, self.value))
      return constrain(key, "batch", None, "kv_heads", None), constrain(value, "batch", None, "kv_heads", None)

    options = AttentionOptions(
      visibility=Visibility(causal=False),
      scale=c.query_scale,
      softcap=c.attention_softcap,
      backend=self.kernel,
      target=self.target,
    )
    out, cache = cache.attend_encoded(layer, query, keys_values, options)
    return self.output(out.reshape(*out.shape[:2], -1)), cache

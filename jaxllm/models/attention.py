"""Self- and cross-attention with grouped key/value heads, for training and for cached decoding."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.kernels import Visibility
from jaxllm.models import positions as pos
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import matrix_init
from jaxllm.models.linear import Linear, parameter
from jaxllm.models.norms import Norm
from jaxllm.parallel.kernels import attention
from jaxllm.parallel.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the tokens of a batch stand; computed once, used by every layer."""

  rope: dict[str, tuple[Array, Array]]  # layer kind -> cos and sin [B, T, rotary_dim / 2]
  segment_ids: Int[Array, "B T"] | None  # None: one document a row
  positions: Int[Array, "B T"]
  bias: Float[Array, "#B N T S"] | None = None  # of the scores, where positions are relative
  encoded: Float[Array, "B S D"] | None = None  # the encoder's states, for cross-attention
  encoded_segment_ids: Int[Array, "B S"] | None = None  # None: every state belongs to its row's document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossCache:
  """Keys and values of the encoder's states, a [B, S, K, H] for each layer, and the states' segments."""

  key: tuple[Array, ...] | Array
  value: tuple[Array, ...] | Array
  segment_ids: Int[Array, "B S"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of the tokens so far; slot s of row b holds the token at position s.

  key, value: a [B, S, K, H] for each layer, apart so that a step writes its token where it lies and copies
  nothing (one layer's cache: the array itself). length: [B], the tokens that each row holds.
  """

  key: tuple[Array, ...] | Array
  value: tuple[Array, ...] | Array
  length: Int[Array, " B"]
  cross: CrossCache | None = None  # of an encoder_decoder, from its first call on

  def of_layer(self, i: int) -> "KVCache":
    """One layer's cache."""
    cross = self.cross
    if cross is not None:
      cross = CrossCache(cross.key[i], cross.value[i], cross.segment_ids)
    return KVCache(self.key[i], self.value[i], self.length, cross)

  @staticmethod
  def of_layers(layers: list["KVCache"], length: Int[Array, " B"]) -> "KVCache":
    """The cache of all layers."""
    cross = layers[0].cross
    if cross is not None:
      keys, values = tuple(c.cross.key for c in layers), tuple(c.cross.value for c in layers)
      cross = CrossCache(keys, values, cross.segment_ids)
    return KVCache(tuple(c.key for c in layers), tuple(c.value for c in layers), length, cross)


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
      self.query_norm = Norm(c, compute, N * H if full else H, rngs=rngs)
      self.key_norm = Norm(c, compute, K * H if full else H, rngs=rngs)
    if c.attention_sinks:
      self.sinks = parameter(rngs, (N,), ("heads",), nnx.initializers.zeros)

  def __call__(
    self, x: Float[Array, "B T D"], place: Placement, kind: str, cache: KVCache | None = None
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Attends within x, or to the cache as well; returns the cache with x's keys and values written."""
    c = self.c
    query, key, value = self.query(x), self.key(x), self.value(x)
    if c.qk_norm == "full":
      query, key = self.query_norm(query), self.key_norm(key)
    query, key, value = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (query, key, value))
    if c.qk_norm == "head":
      query, key = self.query_norm(query), self.key_norm(key)
    if c.position == "rope" and kind != "nope":
      query, key = (pos.apply_rope(y, place.rope[kind], backend=self.elementwise) for y in (query, key))
    query = checkpoint_name(constrain(query, "batch", "seq", "heads", None), "query")
    key = checkpoint_name(constrain(key, "batch", None, "kv_heads", None), "key")
    value = checkpoint_name(constrain(value, "batch", None, "kv_heads", None), "value")
    options = dict(
      visibility=Visibility(
        causal=c.architecture != "encoder",
        window=c.sliding_window if kind == "local" else None,
        sink_tokens=c.sink_tokens if kind == "local" else 0,
      ),
      scale=c.query_scale,
      softcap=c.attention_softcap,
      sinks=self.sinks[...] if c.attention_sinks else None,
      alibi_slopes=jnp.asarray(pos.alibi_slopes(c.num_heads)) if c.position == "alibi" else None,
      bias=place.bias,
    )
    if cache is None:
      segments = None if place.segment_ids is None else (place.segment_ids, place.segment_ids)
      out = attention(
        query,
        key,
        value,
        segment_ids=segments,
        key_positions=place.positions,
        backend=self.kernel,
        target=self.target,
        **options,
      )
    else:
      cache = write_cache(cache, key, value)
      out = attention(
        query,
        cache.key.astype(query.dtype),
        cache.value.astype(query.dtype),
        query_offset=cache.length,
        backend=self.kernel,
        target=self.target,
        **options,
      )
    out = checkpoint_name(out.reshape(*out.shape[:2], -1), "attention")
    return self.output(out), cache


class CrossAttention(Attention):
  """softmax(q k^T) v with the keys and values of an encoder's states: no positions, no causal order."""

  def __call__(  # type: ignore[override]
    self, x: Float[Array, "B T D"], place: Placement, cache: KVCache | None = None
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """Attends to `place.encoded`, whose keys and values join the cache; without it, to the cache's."""
    c = self.c
    heads = lambda y: y.reshape(*y.shape[:2], -1, c.head_dim)  # noqa: E731
    query = constrain(heads(self.query(x)), "batch", "seq", "heads", None)
    if place.encoded is None:
      key, value, segment_ids = cache.cross.key, cache.cross.value, cache.cross.segment_ids
    else:
      key, value = (heads(linear(place.encoded)) for linear in (self.key, self.value))
      key, value = (constrain(y, "batch", None, "kv_heads", None) for y in (key, value))
      segment_ids = place.encoded_segment_ids
      if cache is not None:
        cache = dataclasses.replace(cache, cross=CrossCache(key, value, segment_ids))
    segments = None
    if segment_ids is not None or place.segment_ids is not None:
      ones = lambda y: jnp.ones(y.shape[:2], jnp.int32)  # noqa: E731
      segments = (
        ones(query) if place.segment_ids is None else place.segment_ids,
        ones(key) if segment_ids is None else segment_ids,
      )
    out = attention(
      query,
      key.astype(query.dtype),
      value.astype(query.dtype),
      visibility=Visibility(causal=False),
      segment_ids=segments,
      scale=c.query_scale,
      softcap=c.attention_softcap,
      backend=self.kernel,
      target=self.target,
    )
    return self.output(out.reshape(*out.shape[:2], -1)), cache


def write_cache(cache: KVCache, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"]) -> KVCache:
  """One layer's cache with T new tokens written after each row's `length` (which the model advances)."""

  def write(buffer, new):
    put = lambda row, tokens, start: jax.lax.dynamic_update_slice_in_dim(row, tokens, start, axis=0)  # noqa: E731
    return jax.vmap(put)(buffer, new.astype(buffer.dtype), cache.length)

  return dataclasses.replace(cache, key=write(cache.key, key), value=write(cache.value, value))

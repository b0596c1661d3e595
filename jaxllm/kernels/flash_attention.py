"""Attention: one function, every masking option, named backends.

Shape letters: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.errors import ConfigError
from jaxllm.kernels.attention_cpu import attention_cpu

MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN
QUERY_BLOCK = 512  # queries whose scores the xla backend holds at once


@dataclasses.dataclass(frozen=True)
class Visibility:
  """Which keys a query may see, apart from the arrays that say where each one stands.

  causal: keys after the query are hidden. window: so many keys up to and including the query's own
  (bidirectional: on either side, less than `window` away). sink_tokens: keys at positions below this stay
  visible past the window (arXiv 2309.17453).
  """

  causal: bool = True
  window: int | None = None
  sink_tokens: int = 0


def flash_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  visibility: Visibility = Visibility(),
  query_offset: Int[Array, " B"] | None = None,
  segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  key_positions: Int[Array, "B S"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  bias: Float[Array, "#B N T S"] | None = None,
  backend: str = "xla",
) -> Float[Array, "B T N H"]:
  """softmax(scale * query key^T + bias) value over the keys that each query may see.

  Query head n reads key head n // G. The softmax runs in float32. A query that sees no key gives zeros.
  Hidden keys and values never reach a result or a gradient, as long as they are finite; those of segment 0
  may be anything, NaN included. (Slots of a cache past its length are not cleaned, because that would copy
  the cache at every step: whoever hands on a row that may hold NaN zeroes it.)

  Args:
    query_offset: index of the first query among the keys, for each row (0 by default); a cached step
      passes the number of keys that came before.
    segment_ids: (of queries, of keys); tokens see only their own segment, and segment 0 is padding that
      nobody sees.
    key_positions: position of each key in its document, needed for `sink_tokens`.
    scale: of the scores, H ** -0.5 by default.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118).
    sinks: a logit per head that joins the softmax and carries no value (gpt-oss, arXiv 2508.10925).
    alibi_slopes: scores lose slope * distance (Press et al., arXiv 2108.12409).
    bias: added to the scores (T5's relative positions).
    backend: "xla" (anywhere), "cpu" (scores kept in cache), "cudnn" (NVIDIA, 16 bits). The last two
      compute plain attention: no soft-cap, sinks, ALiBi, bias or offset; "cudnn" only of a sequence to
      itself, "cpu" also from one to another where every key is visible.

  Raises:
    ConfigError: the backend cannot compute what is asked.
  """
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  if segment_ids is not None:  # probability 0 times NaN is NaN, so padding is cleared and not only masked
    real_query, real_key = (ids[:, :, None, None] != 0 for ids in segment_ids)
    query = jnp.where(real_query, query, 0)
    key, value = jnp.where(real_key, key, 0), jnp.where(real_key, value, 0)
  if backend != "xla":
    extras = any(option is not None for option in (softcap, sinks, alibi_slopes, bias, query_offset))
    whole = not visibility.causal and visibility.window is None
    if extras or visibility.sink_tokens or (query.shape[1] != key.shape[1] and not (backend == "cpu" and whole)):
      raise ConfigError(f"attention backend {backend!r} computes plain self-attention only; use 'xla' here")
    if backend == "cudnn":
      return _cudnn(query, key, value, visibility, segment_ids, scale)
    return attention_cpu(
      query,
      key,
      value,
      causal=visibility.causal,
      window=visibility.window,
      segment_ids=segment_ids,
      scale=scale,
    )
  options = dict(scale=scale, softcap=softcap, sinks=sinks, alibi_slopes=alibi_slopes)
  offset = jnp.zeros(query.shape[0], jnp.int32) if query_offset is None else query_offset
  length = query.shape[1]
  if length <= QUERY_BLOCK:
    return _dense(query, key, value, visibility, offset, segment_ids, key_positions, bias, **options)

  # Longer than a block: queries go block by block and scores are recomputed in the backward pass, so
  # that memory grows with T and not with T * S.
  pad = -length % QUERY_BLOCK
  blocks = (length + pad) // QUERY_BLOCK

  def in_blocks(x):
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(block):
    q, start, q_segments, rows = block
    rows = None if rows is None else jnp.moveaxis(rows, 1, 2)
    segments = None if segment_ids is None else (q_segments, segment_ids[1])
    return _dense(q, key, value, visibility, offset + start, segments, key_positions, rows, **options)

  q_segments = jnp.zeros((query.shape[0], length), jnp.int32) if segment_ids is None else segment_ids[0]
  bias_rows = None if bias is None else in_blocks(jnp.moveaxis(bias, 2, 1))
  starts = jnp.arange(blocks) * QUERY_BLOCK
  out = jax.lax.map(one, (in_blocks(query), starts, in_blocks(q_segments), bias_rows))
  return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], length + pad, *query.shape[2:])[:, :length]


def _visible(visibility, offset, T, S, segment_ids, key_positions):
  """[B or 1, T, S] boolean: may query t see key s?"""
  t = offset[:, None, None] + jnp.arange(T)[None, :, None]
  s = jnp.arange(S)[None, None, :]
  visible = jnp.ones((1, T, S), bool)
  if visibility.window is not None:
    visible = (t - s < visibility.window) & (s - t < visibility.window)
    if visibility.sink_tokens:
      positions = jnp.arange(S)[None] if key_positions is None else key_positions
      visible |= (positions < visibility.sink_tokens)[:, None, :]
  if visibility.causal:
    visible &= s <= t
  if segment_ids is not None:
    q_segments, k_segments = segment_ids
    visible &= (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments != 0)[:, None, :]
  return visible


def _dense(
  query, key, value, visibility, offset, segment_ids, key_positions, bias, *, scale, softcap, sinks, alibi_slopes
):
  """The reference: all scores of the block at once."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  grouped = query.reshape(B, T, K, N // K, H)
  scores = scale * jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if alibi_slopes is not None:
    distance = jnp.abs(offset[:, None, None] + jnp.arange(T)[None, :, None] - jnp.arange(S)[None, None, :])
    slopes = alibi_slopes.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    scores -= slopes * distance[:, None, None].astype(jnp.float32)
  if bias is not None:
    scores += bias.astype(jnp.float32).reshape(bias.shape[0], K, N // K, T, S)
  visible = _visible(visibility, offset, T, S, segment_ids, key_positions)[:, None, None]
  scores = jnp.where(visible, scores, MASKED)
  top = scores.max(-1, keepdims=True)
  if sinks is not None:
    sink = sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    top = jnp.maximum(top, sink)
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
  total = weights.sum(-1, keepdims=True)
  if sinks is not None:
    total += jnp.exp(sink - top)
  probabilities = (weights / jnp.maximum(total, 1e-30)).astype(value.dtype)
  return jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, value).reshape(B, T, N, -1)


def _cudnn(query, key, value, visibility, segment_ids, scale):
  """cuDNN's fused attention; segments go in as a mask array."""
  mask = None
  if segment_ids is not None:
    q_segments, k_segments = segment_ids
    mask = (q_segments[:, None, :, None] == k_segments[:, None, None, :]) & (k_segments != 0)[:, None, None, :]
  window = None
  if visibility.window is not None:
    window = (visibility.window - 1, 0 if visibility.causal else visibility.window - 1)
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=scale,
    is_causal=visibility.causal,
    local_window_size=window,
    implementation="cudnn",
  )

"""`flash_attention`: one function, every masking option, named backends."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import dispatch
from jaxllm.kernels.attention.options import Options, Visibility


def _kept(call, query, key, value, options):
  """By the backend's `forward(call, query, key, value, options)`: out, and the log-sum-exp or None."""
  out, lse = dispatch.run(call, query, key, value, options)
  return (out, lse), (query, key, value, options, out, lse)


def _backward(call, kept, cotangents):
  """By the backend's `backward(call, query, key, value, options, lse, d_out, delta)`: of the first three, their dtypes.

  delta [B, N, T], float32: sum(out * d_out) of each row, less the gradient of lse.
  """
  query, key, value, options, out, lse = kept
  d_out, d_lse = cotangents
  # Row t of the scores' gradient is p * (d_out value^T - delta): a gradient of lse itself enters here only.
  delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32) - d_lse
  gradients = call.module.backward(call, query, key, value, options, lse, d_out, delta)
  d_options = Options(options.visibility, options.scale, options.softcap, lse=options.lse)
  if options.sinks is not None:
    share = jnp.exp(options.sinks.astype(jnp.float32)[None, :, None] - lse)  # the sink's probability
    d_options = dataclasses.replace(d_options, sinks=(-share * delta).sum((0, 2)).astype(options.sinks.dtype))
  return *gradients, d_options


OP = dispatch.Op("attention", kept=_kept, backward=_backward, once=True)


def flash_attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  visibility: Visibility = Visibility(),
  query_offset: Int[Array, " B"] | None = None,
  segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  key_positions: Int[Array, "B S"] | None = None,
  prefix_lengths: Int[Array, " B"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  bias: Float[Array, "#B N T S"] | None = None,
  return_lse: bool = False,
  backend: str | None = None,
  target: str | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
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
    prefix_lengths: keys at indices below a row's are seen by all its queries, whatever the order (prefix-LM,
      arXiv 1910.10683 section 3.2.1).
    scale: of the scores, H ** -0.5 by default.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv 2408.00118).
    sinks: a logit per head that joins the softmax and carries no value (gpt-oss, arXiv 2508.10925).
    alibi_slopes: scores lose slope * distance (Press et al., arXiv 2108.12409); constants, without gradient.
    bias: added to the scores (T5's relative positions).
    return_lse: also the logarithm of the sum of the exponentials of the scores, in nats and float32, sink
      included; -inf where a query sees nothing. Differentiable too.
    backend, target: as in `backends.choose`; with segments the row is that of "packed_attention".

  Raises:
    ConfigError: the backend cannot compute what is asked.
  """
  N, K = query.shape[2], key.shape[2]
  if N % K or value.shape[:3] != key.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
    raise ConfigError(
      f"attention takes query [B, T, N, H], key and value [B, S, K, H] with N a multiple of K; "
      f"these are {query.shape}, {key.shape}, {value.shape}"
    )
  query_segments, key_segments = (None, None) if segment_ids is None else segment_ids
  options = Options(
    visibility=visibility,
    scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
    softcap=softcap,
    query_offset=query_offset,
    query_segments=query_segments,
    key_segments=key_segments,
    key_positions=key_positions if visibility.sink_tokens else None,
    prefix_lengths=prefix_lengths,
    alibi_slopes=None if alibi_slopes is None else jax.lax.stop_gradient(alibi_slopes),
    sinks=sinks,
    bias=bias,
    lse=return_lse,
  )
  op = "attention" if segment_ids is None else "packed_attention"
  call = dispatch.choose(op, OP, backend, target, None, query, key, value, options)
  if segment_ids is not None:  # probability 0 times NaN is NaN, so padding is cleared and not only masked
    real_query, real_key = (ids[:, :, None, None] != 0 for ids in segment_ids)
    query = jnp.where(real_query, query, 0)
    key, value = jnp.where(real_key, key, 0), jnp.where(real_key, value, 0)
  out, lse = dispatch.run(call, query, key, value, options)
  return (out, lse) if return_lse else out

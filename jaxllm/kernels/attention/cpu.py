"""Training and prefill attention for CPUs.

Causal, window and segment masks run in the C++ kernel (`kernels/cpu/attention.cc`), which keeps one head's keys and
values in the second-level cache, skips keys that no query of a block may see, and stores only the log-sum-exp for the
backward pass. Machines without that kernel take the XLA form: the same computation per group of heads that fits the
cache, recomputed in the backward pass.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.kernels import cpu_ffi
from jaxllm.kernels.attention import decode
from jaxllm.kernels.attention.options import Options

CACHE_BYTES = 4 << 20  # scores of one head group in the XLA form should fit the second-level caches


def refuses(call, query, key, value, options: Options) -> str | None:
  """Why the call cannot be computed here, or None."""
  if decode.computes(query, key, value, options):
    return None
  asked = options.asked - ({"query_offset"} if cpu_ffi.available() else set())
  if unable := asked - {"causal", "window", "segment_ids"}:
    return f"no {', '.join(sorted(unable))}"
  whole = not options.visibility.causal and options.visibility.window is None
  if query.shape[1] != key.shape[1] and not whole and options.query_offset is None:
    return "queries and keys of one length only"
  return None if value.shape[3] == query.shape[3] else "keys and values of one head dim only"


def forward(
  call, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], options: Options
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"] | None]:
  """Causal order, window and segments; of a few queries and a cache most options, and the log-sum-exp."""
  if decode.computes(query, key, value, options):
    return decode.forward(call, query, key, value, options)
  out = attention_cpu(
    query,
    key,
    value,
    causal=options.visibility.causal,
    window=options.visibility.window,
    segment_ids=None if options.query_segments is None else (options.query_segments, options.key_segments),
    query_offset=options.query_offset,
    scale=options.scale,
  )
  return out, None


def attention_cpu(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  causal: bool,
  window: int | None = None,
  segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
  query_offset: Int[Array, " B"] | None = None,
  scale: float,
) -> Float[Array, "B T N H"]:
  """softmax(scale q k^T + masks) v, with float32 softmax; differentiable in q, k, v.

  Query i stands at key i + query_offset (of its row; 0 by default). `window` w: query i sees keys j > i - w, and
  j < i + w when not causal. `segment_ids` = (query's, key's): equal ids see each other, id 0 is
  padding; a query that sees nothing returns zeros. N must be a multiple of K (grouped queries).
  """
  same = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)
  if not (same and cpu_ffi.available()):
    return _xla_attention(q, k, v, causal, window, segment_ids, query_offset, scale)
  empty = jnp.zeros((0, 0), jnp.int32)
  q_seg, kv_seg = segment_ids if segment_ids is not None else (empty, empty)
  offset = jnp.zeros(0, jnp.int32) if query_offset is None else query_offset
  places = (x.astype(jnp.int32) for x in (q_seg, kv_seg, offset))
  return _ffi_attention(causal, int(window or 0), float(scale), q, k, v, *places)


# ---------------------------------------------------------------- C++


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _ffi_attention(causal, window, scale, q, k, v, q_seg, kv_seg, offset):
  return _ffi_forward(causal, window, scale, q, k, v, q_seg, kv_seg, offset)[0]


def _ffi_forward(causal, window, scale, q, k, v, q_seg, kv_seg, offset):
  B, T, N, _ = q.shape
  out = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
  o, lse = cpu_ffi.call(
    "cpu_attention",
    out,
    q,
    k,
    v,
    q_seg,
    kv_seg,
    offset,
    causal=causal,
    window=np.int64(window),
    scale=np.float32(scale),
  )
  return o, (q, k, v, q_seg, kv_seg, offset, o, lse)


def _ffi_backward(causal, window, scale, saved, do):
  q, k, v, q_seg, kv_seg, offset, o, lse = saved
  out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v))
  dq, dk, dv = cpu_ffi.call(
    "cpu_attention_grad",
    out,
    q,
    k,
    v,
    q_seg,
    kv_seg,
    offset,
    o,
    lse,
    do.astype(q.dtype),
    causal=causal,
    window=np.int64(window),
    scale=np.float32(scale),
  )
  return dq, dk, dv, None, None, None


_ffi_attention.defvjp(_ffi_forward, _ffi_backward)


# ---------------------------------------------------------------- XLA


def visible(causal, window, segments, offset, T, S):
  """Mask [T, S] of one row; None when every key is visible."""
  i, j = jnp.arange(T)[:, None] + offset, jnp.arange(S)[None, :]
  mask = None
  if causal:
    mask = j <= i
  if window is not None:
    near = (j > i - window) & (j < i + window)
    mask = near if mask is None else mask & near
  if segments is not None:
    a, b = segments
    same = (a[:, None] == b[None, :]) & (a[:, None] != 0)
    mask = same if mask is None else mask & same
  return mask


def _xla_attention(q, k, v, causal, window, segment_ids, query_offset, scale):
  """One (batch, kv head) group after another, so that its scores stay in cache and are recomputed for backward."""
  B, T, N, H = q.shape
  S, K = k.shape[1], k.shape[2]
  G = N // K
  segments = None if segment_ids is None else tuple(jnp.repeat(s, K, axis=0) for s in segment_ids)
  offsets = jnp.zeros(B * K, jnp.int32) if query_offset is None else jnp.repeat(query_offset, K)

  def group(args):
    q, k, v, segments, offset = args  # [G, T, H], [S, H], [S, H], ([T], [S]), []
    z = jnp.einsum("gth,sh->gts", q, k, preferred_element_type=jnp.float32) * scale
    mask = visible(causal, window, segments, offset, T, S)
    z = z if mask is None else jnp.where(mask, z, -jnp.inf)
    top = z.max(-1, keepdims=True)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    p = jnp.exp(z - top)
    total = p.sum(-1, keepdims=True)
    p = p / jnp.where(total == 0.0, 1.0, total)
    return jnp.einsum("gts,sh->gth", p.astype(v.dtype), v, preferred_element_type=jnp.float32).astype(q.dtype)

  qg = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B * K, G, T, H)
  kg, vg = (a.transpose(0, 2, 1, 3).reshape(B * K, S, H) for a in (k, v))
  qg, kg, vg = lax.optimization_barrier((qg, kg, vg))
  at_once = int(min(B * K, max(1, CACHE_BYTES // (4 * G * T * S))))
  out = lax.map(jax.checkpoint(group), (qg, kg, vg, segments, offsets), batch_size=at_once)
  return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

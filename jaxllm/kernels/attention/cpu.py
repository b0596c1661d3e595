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
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_ffi
from jaxllm.kernels.attention import decode
from jaxllm.kernels.attention.options import Options, visible

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
  same = query.dtype == key.dtype == value.dtype and query.dtype in (jnp.float32, jnp.bfloat16)
  if not (same and cpu_ffi.available()):
    return _by_groups(query, key, value, options), None
  attributes, places = arguments(options)
  return _native(attributes, query, key, value, *places), None


def gradients(query, key, value, options: Options, out, lse: Float[Array, "B N T"], d_out) -> tuple[Array, ...]:
  """Of queries, keys and values by the C++ kernel; options: causal order, window, segments and an offset.

  Args:
    lse: of the scores; inf where a query sees nothing.
  """
  attributes, places = arguments(options)
  return _backward(attributes, (query, key, value, *places, out, lse), d_out)[:3]


# ---------------------------------------------------------------- C++


def arguments(options: Options):
  """The kernel's attributes by name, and its arrays that say where tokens stand."""
  window, scale = np.int64(options.visibility.window or 0), np.float32(options.scale)
  attributes = ("causal", options.visibility.causal), ("window", window), ("scale", scale)
  empty = jnp.zeros((0, 0), jnp.int32)
  segments = (empty, empty) if options.query_segments is None else (options.query_segments, options.key_segments)
  offset = jnp.zeros(0, jnp.int32) if options.query_offset is None else options.query_offset
  return attributes, tuple(x.astype(jnp.int32) for x in (*segments, offset))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _native(attributes, *arrays):
  return _kept(attributes, *arrays)[0]


def _kept(attributes, q, *others):
  B, T, N, _ = q.shape
  out = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
  o, lse = cpu_ffi.call("cpu_attention", out, q, *others, **dict(attributes))
  return o, (q, *others, o, lse)


def _backward(attributes, kept, do):
  out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kept[:3])
  arrays = *kept, do.astype(kept[0].dtype)
  return *cpu_ffi.call("cpu_attention_grad", out, *arrays, **dict(attributes)), None, None, None


_native.defvjp(_kept, _backward)


# ---------------------------------------------------------------- XLA


def _by_groups(q, k, v, options):
  """One (batch, kv head) group after another, so that its scores stay in cache and are recomputed for backward."""
  B, T, N, H = q.shape
  S, K = k.shape[1], k.shape[2]
  G = N // K
  each = lambda x: None if x is None else jnp.repeat(x, K, axis=0)  # noqa: E731
  offsets = jnp.zeros(B * K, jnp.int32) if options.query_offset is None else each(options.query_offset)

  def group(args):
    q, k, v, offset, of_queries, of_keys = args  # [G, T, H], [S, H], [S, H], [], [T], [S]
    z = jnp.einsum("gth,sh->gts", q, k, preferred_element_type=jnp.float32) * options.scale
    segments = {} if of_keys is None else {"query_segments": of_queries[:, None], "key_segments": of_keys}
    z = jnp.where(visible(options, jnp.arange(T)[:, None] + offset, jnp.arange(S), segments), z, -jnp.inf)
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
  arrays = qg, kg, vg, offsets, each(options.query_segments), each(options.key_segments)
  out = lax.map(jax.checkpoint(group), arrays, batch_size=at_once)
  return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)

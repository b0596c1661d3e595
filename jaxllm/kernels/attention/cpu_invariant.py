"""Attention in the order of sums of paged attention on CPUs, whose tiles it uses (`kernels/cpu/decode.cc`).

A token's result is the same to the bit as when it is read from a cache, in any parts, and in any row of packed
documents. The gradient is that of the CPU's other kernel, or of the plain form.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_decode, cpu_ffi
from jaxllm.kernels.attention import cpu, reference
from jaxllm.kernels.attention.options import Options

PLAIN = {"causal", "window", "query_offset", "segment_ids"}  # what the gradient's kernel knows


def refuses(call, query, key, value, options: Options) -> str | None:
  """Why the call cannot be computed here, or None."""
  N, H = query.shape[2:]
  if unable := options.asked - PLAIN - {"softcap", "alibi_slopes"}:
    return f"no {', '.join(sorted(unable))}"
  if options.visibility.window is not None and not options.visibility.causal:
    return "no window without causal order"
  if options.query_segments is not None and (query.shape[1] != key.shape[1] or options.query_offset is not None):
    return "segments of one length of queries and keys only"
  if value.shape != key.shape:
    return "keys and values of one head dim only"
  if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.float32, jnp.bfloat16):
    return "queries, keys and values in float32 or bfloat16 only"
  return cpu_decode.refuses(N // key.shape[2], H, key.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(
  call, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], options: Options
) -> tuple[Float[Array, "B T N H"], None]:
  """The result in the queries' dtype."""
  return _kept(call, query, key, value, options)[0]


def _kept(call, query, key, value, options):
  B, T, N, _ = query.shape
  attributes, (segments, _, offset) = cpu.arguments(options)
  slopes = jnp.zeros(0) if options.alibi_slopes is None else options.alibi_slopes
  out, lse = cpu_ffi.call(
    "cpu_attention_in_order",
    (jax.ShapeDtypeStruct(query.shape, jnp.float32), jax.ShapeDtypeStruct((B, N, T), jnp.float32)),
    query.astype(jnp.float32),
    key,
    value,
    segments,
    offset,
    slopes.astype(jnp.float32),
    **dict(attributes),
    softcap=np.float32(options.softcap or 0),
  )
  out = out.astype(query.dtype)
  return (out, None), (query, key, value, options, out, lse)


def _backward(call, kept, cotangents):
  query, key, value, options, out, lse = kept
  d_out = cotangents[0]
  if options.asked <= PLAIN:
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # of a query that sees nothing, as that kernel has it
    return *cpu.gradients(query, key, value, options, out, lse, d_out), None
  plain = lambda *arrays: reference.forward(dataclasses.replace(call, target=None), *arrays, options)[0]  # noqa: E731
  return *jax.vjp(plain, query, key, value)[1](d_out), None


forward.defvjp(_kept, _backward)

"""Attention of a few queries to a cache on CPUs, by the C++ decoding kernel; the gradient is the plain form's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_decode
from jaxllm.kernels.attention import reference
from jaxllm.kernels.attention.options import Options

ASKED = {"causal", "window", "query_offset", "softcap", "alibi_slopes", "sinks", "lse"}
LONGER = 4  # so many times more keys than queries, or the kernel for prefill is as good


def computes(query: Array, key: Array, value: Array, options: Options) -> bool:
  """Whether this is a call for the decoding kernel: few queries, many keys, and options that it has."""
  T, N, H = query.shape[1:]
  S, K = key.shape[1:3]
  v = options.visibility
  return (
    S >= LONGER * T
    and query.size > 0
    and options.asked <= ASKED
    and (v.causal or v.window is None)
    and value.shape == key.shape
    and value.dtype == key.dtype
    and key.dtype != jnp.int8
    and query.dtype in (jnp.float32, jnp.bfloat16)
    and cpu_decode.refuses(T * N // K, H, key.dtype) is None
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def forward(
  call, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"], options: Options
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """The result in the queries' dtype, and the log-sum-exp, sinks included."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  G = N // K
  offset = jnp.zeros(B, jnp.int32) if options.query_offset is None else options.query_offset.astype(jnp.int32)
  end = jnp.clip(offset + T, 0, S) if options.visibility.causal else jnp.full(B, S, jnp.int32)
  rows = jnp.arange(B, dtype=jnp.int32)
  out, lse = cpu_decode.attend(
    query.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H),
    key,
    value,
    rows[:, None],
    rows,
    offset,
    end,
    paged=False,
    group=G,
    scale=options.scale,
    causal=options.visibility.causal,
    window=options.visibility.window,
    softcap=options.softcap,
    slopes=options.alibi_slopes,
  )
  out = out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
  lse = lse.reshape(B, K, T, G).transpose(0, 1, 3, 2).reshape(B, N, T)
  if options.sinks is not None:
    every = jnp.logaddexp(lse, options.sinks.astype(jnp.float32)[:, None])
    out *= jnp.exp(lse - every).transpose(0, 2, 1)[..., None]
    lse = every
  return out.astype(query.dtype), lse


def _backward(call, saved, cotangents):
  call = dataclasses.replace(call, target=None)  # whose tiles are for many queries
  return jax.vjp(functools.partial(reference.forward, call), *saved)[1](cotangents)


forward.defvjp(lambda call, *arrays: (forward(call, *arrays), arrays), _backward)

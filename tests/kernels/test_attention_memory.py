"""Attention's temporary memory grows with the length and not with its square; the compiler's own account."""

import jax
import jax.numpy as jnp

from jaxllm.kernels import flash_attention
from jaxllm.kernels.attention import reference


def temporaries(attend, T):
  q, k = (jax.ShapeDtypeStruct((1, T, heads, 32), jnp.float32) for heads in (4, 2))

  def gradients(q, k, v, d_out):
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(d_out)

  return jax.jit(gradients).lower(q, k, k, q).compile().memory_analysis().temp_size_in_bytes


def test_the_xla_form():
  attend = lambda q, k, v: flash_attention(q, k, v, backend="xla")  # noqa: E731
  short, long = (temporaries(attend, T) for T in (4096, 8192))
  assert long < 2.2 * short


def test_this_test_can_fail(monkeypatch):
  """With all scores at once memory grows fourfold."""
  monkeypatch.setattr(reference, "QUERY_BLOCK", 1 << 30)
  attend = lambda q, k, v: flash_attention(q, k, v, backend="xla")  # noqa: E731
  short, long = (temporaries(attend, T) for T in (1024, 2048))
  assert long > 3.5 * short

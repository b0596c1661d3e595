"""Attention from one sequence to another, and with a bias, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import kernels as fa
from jaxllm.base.errors import ConfigError
from jaxllm.kernels.attention import reference as xla

B, T, S, N, K, H = 2, 12, 19, 4, 2, 8


def arrays():
  rng = np.random.default_rng(0)
  q, k, v = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
  segments = rng.integers(0, 3, (B, T)).astype(np.int32), rng.integers(0, 3, (B, S)).astype(np.int32)
  return q, k, v, segments, rng.standard_normal((1, N, T, S)).astype(np.float32)


def reference(q, k, v, segments, bias=0.0):
  q, k, v = (x.astype(np.float64) for x in (q, np.repeat(k, N // K, axis=2), np.repeat(v, N // K, axis=2)))
  scores = np.einsum("btnh,bsnh->bnts", q, k) * H**-0.5 + bias
  visible = (segments[0][:, :, None] == segments[1][:, None]) & (segments[1] != 0)[:, None]
  weights = np.where(visible[:, None], np.exp(scores), 0)
  total = weights.sum(-1, keepdims=True)
  return np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v)


@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_from_one_sequence_to_another(backend):
  q, k, v, segments, _ = arrays()
  whole = fa.Visibility(causal=False)
  attend = lambda k, v, b: fa.flash_attention(q, k, v, visibility=whole, segment_ids=segments, backend=b)  # noqa: E731
  np.testing.assert_allclose(attend(k, v, backend), reference(q, k, v, segments), atol=1e-5)
  gradients = {b: jax.grad(lambda k, v, b=b: jnp.square(attend(k, v, b)).sum(), (0, 1))(k, v) for b in (backend, "xla")}
  for got, want in zip(gradients[backend], gradients["xla"]):
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("block", [512, 5])
def test_bias(block, monkeypatch):
  """Whole, and in blocks of queries."""
  monkeypatch.setattr(xla, "QUERY_BLOCK", block)
  q, k, v, segments, bias = arrays()
  got = fa.flash_attention(q, k, v, visibility=fa.Visibility(causal=False), segment_ids=segments, bias=bias)
  np.testing.assert_allclose(got, reference(q, k, v, segments, bias), atol=1e-5)


def test_what_the_other_backends_refuse():
  q, k, v, _, bias = arrays()
  for backend, options in (("cpu", dict(bias=bias)), ("cudnn", {})):
    with pytest.raises(ConfigError, match="cannot compute this call"):
      fa.flash_attention(q, k, v, visibility=fa.Visibility(causal=False), backend=backend, **options)
  with pytest.raises(ConfigError, match="cannot compute this call"):
    fa.flash_attention(q, k, v, backend="cpu")

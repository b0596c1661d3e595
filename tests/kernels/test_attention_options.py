"""flash_attention's xla backend against float64 numpy: values and gradients, dense and by blocks."""

import functools
import itertools

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import Visibility, flash_attention
from jaxllm.kernels.attention import reference as module

B, N, K, H = 2, 4, 2, 8


def visible(v, T, S, offset, segments, positions):
  return attention_oracle.visible(
    v, B, T, S, offset=offset, segments=None if segments is None else (segments, segments), positions=positions
  )


def reference(q, k, v, d_out, seen, offset, **options):
  r = attention_oracle.attention(q, k, v, d_out, seen, offset=offset, **options)
  return r.out, r.d_query, r.d_key, r.d_value


def arrays(T, S, seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)]
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def ours(q, k, v, d_out, **options):
  @jax.jit
  def run(q, k, v):
    out, pull = jax.vjp(functools.partial(flash_attention, **options), q, k, v)
    return out, *pull(d_out)

  return run(q, k, v)


def compare(got, want):
  for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1, np.abs(b).max()), err_msg=name)


def packed(T):
  """Segments and positions: documents of different lengths, then padding."""
  segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  for b, cuts in enumerate([(0, T // 3, T - 4), (0, T // 2, T)]):
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
      segments[b, start:end], positions[b, start:end] = i + 1, np.arange(end - start)
  return segments, positions


SINKS, SLOPES = np.linspace(-1, 2, N), np.array([0.5, 0.25, 0.1, 0.05])
OPTIONS = {
  "causal": {},
  "bidirectional": dict(visibility=Visibility(causal=False)),
  "window": dict(visibility=Visibility(window=5)),
  "window-1": dict(visibility=Visibility(window=1)),
  "bidirectional-window": dict(visibility=Visibility(causal=False, window=3)),
  "sink-tokens": dict(visibility=Visibility(window=4, sink_tokens=2)),
  "scale": dict(scale=0.7),
  "softcap": dict(softcap=0.8),
  "sinks": dict(sinks=SINKS),
  "alibi": dict(alibi_slopes=SLOPES),
  "bidirectional-alibi": dict(alibi_slopes=SLOPES, visibility=Visibility(causal=False)),
  "all": dict(visibility=Visibility(window=6, sink_tokens=1), scale=0.9, softcap=1.5, sinks=SINKS, alibi_slopes=SLOPES),
}


@pytest.mark.parametrize("segmented, block", [(False, 512), (True, 512), (True, 8)])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, segmented, block, monkeypatch):
  monkeypatch.setattr(module, "QUERY_BLOCK", block)
  T, options = 21, OPTIONS[name]
  segments, positions = packed(T) if segmented else (None, np.broadcast_to(np.arange(T), (B, T)))
  seen = visible(options.get("visibility", Visibility()), T, T, [0, 0], segments, positions)
  assert not segmented or not seen.any(-1).all()  # padding: rows that see nothing
  math_options = {"slopes" if k == "alibi_slopes" else k: x for k, x in options.items() if k != "visibility"}
  want = reference(*arrays(T, T), seen, [0, 0], **math_options)
  pair = (jnp.asarray(segments), jnp.asarray(segments)) if segmented else None
  jax_options = {k: jnp.asarray(x) if isinstance(x, np.ndarray) else x for k, x in options.items()}
  got = ours(*arrays(T, T), **jax_options, segment_ids=pair, key_positions=jnp.asarray(positions))
  compare(got, want)
  assert not np.asarray(got[0])[~seen.any(-1)].any()  # exactly zero where nothing is seen


@pytest.mark.parametrize("block", [512, 4])
def test_queries_at_an_offset(block, monkeypatch):
  """A chunk of queries on a longer cache, each row at its own place."""
  monkeypatch.setattr(module, "QUERY_BLOCK", block)
  T, S, offset = 6, 24, np.array([3, 17])
  v = Visibility(window=7, sink_tokens=2)
  seen = visible(v, T, S, offset, None, np.broadcast_to(np.arange(S), (B, S)))
  want = reference(*arrays(T, S), seen, offset, sinks=SINKS, slopes=SLOPES)
  got = ours(
    *arrays(T, S), visibility=v, query_offset=jnp.asarray(offset), sinks=jnp.asarray(SINKS),
    alibi_slopes=jnp.asarray(SLOPES),
  )  # fmt: skip
  compare(got, want)


@pytest.mark.parametrize("block", [512, 8])
def test_log_sum_exp_and_sinks_gradient(block, monkeypatch):
  monkeypatch.setattr(module, "QUERY_BLOCK", block)
  T = 21
  segments, _ = packed(T)
  q, k, v, d_out = arrays(T, T)
  d_lse = np.random.default_rng(1).standard_normal((B, N, T)).astype(np.float32)
  seen = visible(Visibility(), T, T, None, segments, None)
  d_lse[~seen.any(-1)[:, None].repeat(N, 1)] = 0
  want = attention_oracle.attention(q, k, v, d_out, seen, d_lse=d_lse, sinks=SINKS)
  pair = (jnp.asarray(segments), jnp.asarray(segments))

  @jax.jit
  def run(q, k, v, sinks):
    call = lambda q, k, v, sinks: flash_attention(q, k, v, segment_ids=pair, sinks=sinks, return_lse=True)  # noqa: E731
    (out, lse), pull = jax.vjp(call, q, k, v, sinks)
    return out, lse, *pull((d_out, d_lse))

  got = run(q, k, v, jnp.asarray(SINKS, jnp.float32))
  compare(got[:1] + got[2:5], (want.out, want.d_query, want.d_key, want.d_value))
  np.testing.assert_allclose(got[1], want.lse, atol=2e-6)
  np.testing.assert_allclose(got[5], want.d_sinks, atol=2e-5)


@pytest.mark.parametrize("block", [512, 8])
def test_prefix(block, monkeypatch):
  monkeypatch.setattr(module, "QUERY_BLOCK", block)
  T, prefix = 21, np.array([0, 9])
  seen = attention_oracle.visible(Visibility(), B, T, T, prefix=prefix)
  compare(ours(*arrays(T, T), prefix_lengths=jnp.asarray(prefix)), reference(*arrays(T, T), seen, None))


def test_ragged_length_beyond_a_block():
  T = 700
  segments, positions = packed(T)
  # visible() is a loop over pairs; the same said with whole arrays
  t = np.arange(T)
  near = (t[:, None] - t < 300) | (positions[:, None, :] < 3)
  same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, None, :]
  seen = (t <= t[:, None]) & near & same
  want = reference(*arrays(T, T), seen, [0, 0])
  pair = (jnp.asarray(segments), jnp.asarray(segments))
  v = Visibility(window=300, sink_tokens=3)
  got = ours(*arrays(T, T), visibility=v, segment_ids=pair, key_positions=jnp.asarray(positions))
  compare(got, want)


@pytest.mark.parametrize("block", [512, 8])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_padding_never_leaks(poison, block, monkeypatch):
  """Whatever stands at segment 0, results and gradients are those of zeros there."""
  monkeypatch.setattr(module, "QUERY_BLOCK", block)
  T = 21
  segments, _ = packed(T)
  pair = (jnp.asarray(segments), jnp.asarray(segments))
  q, k, v, d_out = arrays(T, T)
  want = ours(q, k, v, d_out, segment_ids=pair)
  for x in (q, k, v):
    x[segments == 0] = poison
  got = ours(q, k, v, d_out, segment_ids=pair)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_slots_past_the_cache_never_leak():
  """Any finite value; NaN there is the business of whoever hands the slots on (see the docstring)."""
  S, offset = 16, jnp.array([4, 9])
  q, k, v, _ = arrays(1, S)
  want = flash_attention(q, k, v, query_offset=offset)
  for b in range(B):
    k[b, offset[b] + 1 :], v[b, offset[b] + 1 :] = 1e38, -1e38
  np.testing.assert_array_equal(flash_attention(q, k, v, query_offset=offset), want)


def test_16_bit_inputs_have_a_float32_softmax():
  """bfloat16 in and out; the error is that of rounding the inputs' products once, not of a 16-bit sum."""
  T = 400
  q, k, v, d_out = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in arrays(T, T))
  want = reference(q, k, v, d_out, np.broadcast_to(np.tri(T, dtype=bool), (B, T, T)), [0, 0])[0]
  got = flash_attention(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)))
  assert got.dtype == jnp.bfloat16
  assert np.abs(np.asarray(got, np.float64) - want).max() < 2e-2
  assert np.abs(np.asarray(got, np.float64) - want).mean() < 1e-3


@pytest.mark.parametrize(
  "backend, options",
  [
    *((backend, dict(softcap=1.0)) for backend in ("cpu", "cudnn")),
    *((backend, dict(sinks=jnp.zeros(N))) for backend in ("cpu", "cudnn")),
    *((backend, dict(alibi_slopes=jnp.zeros(N))) for backend in ("cpu", "cudnn")),
    ("cudnn", dict(query_offset=jnp.zeros(B, int))),
  ],
)
def test_backend_that_cannot_raises(backend, options):
  q, k, v, _ = arrays(4, 4)
  with pytest.raises(ConfigError, match=f"'{backend}' cannot compute this call: no "):
    flash_attention(q, k, v, backend=backend, **options)

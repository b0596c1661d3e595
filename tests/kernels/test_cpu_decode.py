"""The CPU's decoding kernel against float64: a cache in one piece through `flash_attention`, in pages through
`paged_attention`."""

import functools

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import paged_oracle
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import Visibility, cpu_ffi, flash_attention, paged_attention
from jaxllm.kernels.attention import Options, cpu
from jaxllm.kernels.attention.api import OP
from jaxllm.kernels.dispatch import Call

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}
SLOPES, SINKS = np.float32([0.5, 0.25, 0.1, 0.02]), np.float32([0.3, -1.0, 2.0, 0.0])


@pytest.fixture(autouse=True)
def native():
  if not cpu_ffi.available():
    pytest.skip(str(cpu_ffi.why_unavailable()))


def draw(B, T, S, N, K, H, dtype, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


CASES = {
  "one token": dict(B=2, T=1, S=300, offset=[299, 17]),
  "long, several parts": dict(B=1, T=1, S=1100, offset=[1090]),
  "few tokens": dict(B=2, T=5, S=77, offset=[0, 60]),
  "H80": dict(B=1, T=3, S=290, H=80, offset=[280]),
  "H128, one key head": dict(B=1, T=2, S=520, K=1, H=128, offset=[518]),
  "every option": dict(B=2, T=3, S=600, offset=[590, 40], window=70, softcap=2.0, sinks=SINKS, alibi_slopes=SLOPES),
  "sees nothing": dict(B=1, T=1, S=40, offset=[200], window=10, sinks=SINKS),
  "bidirectional": dict(B=1, T=2, S=310, causal=False),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", CASES)
def test_one_piece(name, dtype):
  case = dict(N=4, K=2, H=64, causal=True, window=None, offset=None) | CASES[name]
  B, T, S, N, K, H = (case.pop(name) for name in "BTSNKH")
  causal, window, offset = (case.pop(name) for name in ("causal", "window", "offset"))
  v = Visibility(causal, window)
  q, k, values, d_out = draw(B, T, S, N, K, H, dtype)
  if causal and offset[0] + T < S:  # what the cache does not hold yet is never looked at
    empty = (np.arange(S) >= np.asarray(offset)[:, None] + T)[:, :, None, None]
    dirty_k, dirty_v = (jnp.where(empty, jnp.nan, x) for x in (k, values))
  else:
    dirty_k, dirty_v = k, values
  extra = {"query_offset": jnp.int32(offset)} if offset else {}
  run = functools.partial(flash_attention, visibility=v, return_lse=True, backend="cpu", target="cpu", **case, **extra)
  out, lse = jax.jit(run)(q, dirty_k, dirty_v)
  seen = attention_oracle.visible(v, B, T, S, offset=offset)
  rename = {"alibi_slopes": "slopes"}
  want = attention_oracle.attention(
    q, k, values, d_out, seen, offset=offset, **{rename.get(key, key): value for key, value in case.items()}
  )
  assert out.dtype == q.dtype and lse.dtype == jnp.float32
  np.testing.assert_allclose(np.float64(out), want.out, rtol=0, atol=TOLERANCE[dtype] * max(1, np.abs(want.out).max()))
  np.testing.assert_allclose(lse, want.lse, rtol=2e-6, atol=2e-5)


def test_gradient_is_the_plain_form_s():
  q, k, v, d_out = draw(2, 3, 60, 4, 2, 64, "float32")
  run = functools.partial(flash_attention, query_offset=jnp.int32([50, 20]), backend="cpu", target="cpu")
  got = jax.vjp(run, q, k, v)[1](d_out)
  seen = attention_oracle.visible(Visibility(), 2, 3, 60, offset=[50, 20])
  want = attention_oracle.attention(q, k, v, d_out, seen)
  for a, b in zip(got, (want.d_query, want.d_key, want.d_value), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("native", [True, False], ids=["native", "fallback"])
@pytest.mark.parametrize("window", [None, 50])
def test_many_queries_at_an_offset(native, window, monkeypatch):
  """Reading a prompt into a cache: the kernel for training, with the queries' places."""
  if not native:
    monkeypatch.setattr(cpu_ffi, "available", lambda: False)
  offset = [250, 3]
  q, k, v, d_out = draw(2, 70, 330, 4, 2, 64, "float32")
  options = Options(Visibility(window=window), 0.125, query_offset=jnp.int32(offset))
  run = lambda *a: cpu.forward(Call(OP, "cpu", "cpu"), *a, options)[0]  # noqa: E731
  out, pull = jax.vjp(jax.jit(run), q, k, v)
  seen = attention_oracle.visible(Visibility(window=window), 2, 70, 330, offset=offset)
  want = attention_oracle.attention(q, k, v, d_out, seen)
  for a, b in zip((out, *pull(d_out)), (want.out, want.d_query, want.d_key, want.d_value), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max())
  if native:
    through = functools.partial(flash_attention, visibility=Visibility(window=window), query_offset=jnp.int32(offset))
    np.testing.assert_array_equal(through(q, k, v, backend="cpu", target="cpu"), out)


def test_queries_past_a_window_of_all_keys_give_zeros():
  q, k, v, _ = draw(1, 70, 64, 2, 2, 32, "float32")
  run = functools.partial(flash_attention, visibility=Visibility(window=10), query_offset=jnp.int32([100]))
  assert not np.asarray(run(q, k, v, backend="cpu", target="cpu")).any()


PAGED = {
  "decoding": (dict(lengths=[600, 0, 64, 41], K=1, H=128, page_size=64, unused=1), dict(sinks=SINKS)),
  "pages of 20": (dict(lengths=[301, 20, 3], page_size=20, dtype=jnp.float32), dict(window=33)),
  "int8": (dict(lengths=[300, 20], page_size=32, cache=jnp.int8), dict(softcap=5.0, alibi_slopes=SLOPES)),
  "mixed": (dict(lengths=[300, 20, 0], news=[45, 1, 0], page_size=16, padding=3), dict(alibi_slopes=SLOPES, window=90)),
  "mixed, int8": (dict(lengths=[140, 30], news=[50, 30], cache=jnp.int8, dtype=jnp.float32), dict(sinks=SINKS)),
  "mixed, int8 by tiles": (dict(lengths=[290, 30], news=[50, 30], cache=jnp.int8), dict(sinks=SINKS, softcap=5.0)),
  "mixed, float32 cache by tiles": (dict(lengths=[270], news=[39], H=32, cache=jnp.float32), dict(window=50)),
  "bfloat16 cache of float32 queries": (dict(lengths=[270], cache=jnp.bfloat16, dtype=jnp.float32), {}),
}


@pytest.mark.parametrize("name", PAGED)
def test_pages(name):
  shape, options = PAGED[name]
  call = paged_oracle.make_call(**shape)
  run = jax.jit(functools.partial(paged_attention, return_lse=True, backend="cpu", target="cpu", **options))
  result = run(*call.arguments)
  paged_oracle.check(call, result, **options)
  again = run(*call.arguments)
  np.testing.assert_array_equal(np.asarray(result[1]), np.asarray(again[1]))


def test_refuses():
  call = paged_oracle.make_call([20, 3], H=24)
  with pytest.raises(ConfigError, match="multiples of 16"):
    paged_attention(*call.arguments, backend="cpu", target="cpu")
  call = paged_oracle.make_call([20, 3], cache=jnp.float8_e4m3fn)
  with pytest.raises(ConfigError, match="float8"):
    paged_attention(*call.arguments, backend="cpu", target="cpu")

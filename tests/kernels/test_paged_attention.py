"""`paged_attention` in plain JAX against the definition; the cache; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_oracle import check, for_tpu, make_call

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import KVPages, flash_attention, paged_attention, write_pages


def attend(call, **options):
  function = functools.partial(paged_attention, **options, return_lse=True)
  return jax.jit(function)(*call.arguments)


SLOPES, SINKS = jnp.array([0.5, 0.25, 0.1, 0.02]), jnp.array([0.3, -1.0, 2.0, 0.0])


@settings(deadline=None, max_examples=20)
@given(
  lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
  decoding=st.booleans(),
  heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
  page_size=st.sampled_from([16, 32, 64, 128]),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  cache=st.sampled_from([None, None, jnp.int8, jnp.float8_e4m3fn]),
  window=st.sampled_from([None, 1, 7, 40]),
  softcap=st.sampled_from([None, 2.0]),
  sinks=st.booleans(),
  alibi=st.booleans(),
  padding=st.integers(0, 5),
  unused=st.integers(0, 2),
  tpu=st.booleans(),
  seed=st.integers(0, 99),
)
def test_options_and_their_pairs(
  lengths, decoding, heads, page_size, dtype, cache, window, softcap, sinks, alibi, padding, unused, tpu, seed
):
  news = None if decoding else [min(n, int(x)) for n, x in zip(lengths, np.random.default_rng(seed).integers(0, 40, 9))]
  call = make_call(
    lengths, news, N=heads[0], K=heads[1], H=16, page_size=page_size, dtype=dtype, cache=cache, seed=seed,
    padding=padding, unused=unused, tpu=tpu,
  )  # fmt: skip
  if call.query.shape[0] == 0:
    return
  options = {"window": window, "softcap": softcap}
  options |= {"sinks": SINKS} if sinks else {}
  options |= {"alibi_slopes": SLOPES} if alibi else {}
  check(call, attend(call, **options), **options)


@pytest.mark.parametrize("H", [64, 128, 256])
def test_long_mixed_batch(H):
  call = make_call([700, 0, 33, 512, 1], [100, 0, 33, 1, 1], H=H, page_size=64, dtype=jnp.float32, padding=9)
  check(call, attend(call, scale=0.1), scale=0.1)


def test_equals_flash_attention_on_contiguous_data():
  rng = np.random.default_rng(0)
  T, S, N, K, H, size = 40, 96, 4, 2, 64, 32
  q = jnp.asarray(rng.normal(size=(1, T, N, H)), jnp.float32)
  k, v = (jnp.asarray(rng.normal(size=(1, S, K, H)), jnp.float32) for _ in range(2))
  offset = jnp.array([S - T])
  expected, expected_lse = flash_attention(q, k, v, query_offset=offset, sinks=SINKS, return_lse=True)
  paged = [x[0].reshape(S // size, size, K, H).swapaxes(1, 2) for x in (k, v)]
  out, lse = paged_attention(
    q[0], KVPages(*paged), jnp.arange(S // size)[None], jnp.array([S]), jnp.array([0, T]), sinks=SINKS, return_lse=True
  )
  np.testing.assert_allclose(out, expected[0], atol=2e-6)
  np.testing.assert_allclose(lse, expected_lse[0].T, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_sequence_written_piece_by_piece(dtype):
  """Prefill, then token by token, then several at once: each call sees what was written before it."""
  rng = np.random.default_rng(1)
  K, N, H, size, total = 2, 4, 32, 16, 61
  q = jnp.asarray(rng.normal(size=(total, N, H)), jnp.float32)
  k, v = (jnp.asarray(rng.normal(size=(total, K, H)), jnp.float32) for _ in range(2))
  expected = flash_attention(q[None], k[None], v[None])[0]
  pages = jax.tree.map(
    lambda x: x if x.dtype == jnp.int8 else jnp.full_like(x, jnp.nan), KVPages.zeros(9, size, K, H, dtype)
  )
  table = jnp.asarray([[5, 0, 7, 2], [1, 1, 1, 1]])  # the second sequence stays empty
  write, attend = jax.jit(write_pages, donate_argnums=0), jax.jit(paged_attention)
  at = 0
  for news in [30, 1, 1, 17, 12]:
    piece, at = slice(at, at + news), at + news
    rest = (table, jnp.array([at, 0]), jnp.array([0, news, news]))
    pages = write(
      pages, jnp.pad(k[piece], ((0, 3), (0, 0), (0, 0))), jnp.pad(v[piece], ((0, 3), (0, 0), (0, 0))), *rest
    )
    out = attend(q[piece], pages, *rest)
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 3e-2, "float8_e4m3fn": 0.15}[dtype]
    np.testing.assert_allclose(out, expected[piece], atol=tolerance)


def test_writing_touches_only_its_slots_and_rounds_to_the_nearest():
  rng = np.random.default_rng(2)
  pages = KVPages(*(jnp.asarray(rng.integers(-99, 99, (6, 2, 16, 8)), jnp.int8) for _ in range(2)),
                  *(jnp.asarray(rng.normal(size=(6, 2, 16)), jnp.float32) for _ in range(2)))  # fmt: skip
  k, v = (jnp.asarray(rng.normal(size=(3, 2, 8)), jnp.float32) for _ in range(2))
  k = k.at[0, 1].set(0.0)
  table, lengths = jnp.array([[4, 3], [1, 0], [2, 5]]), jnp.array([17, 0, 40])  # the last is longer than its pages
  new = write_pages(pages, k, v, table, lengths)
  for name in ("keys", "values", "key_scales", "value_scales"):
    before, after = (np.array(getattr(p, name)) for p in (pages, new))
    written = after[3, :, 0].copy()
    after[3, :, 0] = before[3, :, 0]
    np.testing.assert_array_equal(before, after)
    if name == "keys":
      kept = written.astype(np.float64) * np.asarray(new.key_scales)[3, :, 0, None]
      assert np.abs(kept - k[0]).max() <= np.abs(np.asarray(k[0])).max() / 254 + 1e-6
      assert np.abs(written[0]).max() == 127 and not written[1].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])  # XLA for CPU copies 8-bit floats
def test_writing_is_in_place_when_donated(dtype):
  size = 64 * 2**20
  pages = jax.eval_shape(lambda: KVPages.zeros(size // (64 * 2 * 64), 64, 2, 64, dtype))
  new = jax.ShapeDtypeStruct((8, 2, 64), jnp.bfloat16)
  ints = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((8, 4), (8,))]
  compiled = jax.jit(write_pages, donate_argnums=0).lower(pages, new, new, *ints).compile()
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= 2 * size * pages.keys.dtype.itemsize and memory.temp_size_in_bytes < size // 16


@pytest.mark.parametrize("K,H,dtype", [(3, 64, "bfloat16"), (2, 80, "float32"), (5, 32, "int8"), (1, 192, "bfloat16")])
def test_layout_for_tpu(K, H, dtype):
  """New tokens land where the layout says, in rows without a gap for heads of 64; and are read from there."""
  rng = np.random.default_rng(3)
  write, attend = jax.jit(write_pages), jax.jit(paged_attention)
  new = [jnp.asarray(rng.normal(size=(4, K, H)), dtype if dtype != "int8" else "float32") for _ in range(2)]
  rest = jnp.array([[2, 0], [1, 3]]), jnp.array([18, 9]), jnp.array([0, 3, 4])
  plain, laid_out = (write(KVPages.zeros(4, 16, K, H, dtype, target=target), *new, *rest) for target in ("h100", "v5e"))
  jax.tree.map(np.testing.assert_array_equal, laid_out, for_tpu(plain))
  query = jnp.asarray(rng.normal(size=(4, 2 * K, H)), jnp.float32)
  np.testing.assert_array_equal(attend(query, laid_out, *rest), attend(query, plain, *rest))
  if H == 64:
    assert laid_out.keys.shape == (4, 2, 16, 128)


@pytest.mark.parametrize("target,H,dtype", [("v5e", 64, "bfloat16"), ("v7", 128, "int8"), ("v6e", 80, "float8_e4m3fn")])
def test_writing_is_in_place_on_tpu(target, H, dtype):
  pytest.importorskip("libtpu")
  from machine_code import compile_tpu

  pages = jax.eval_shape(lambda: KVPages.zeros(8192, 128, 4, H, dtype, target=target))
  new, ints = jax.ShapeDtypeStruct((64, 4, H), jnp.bfloat16), jax.ShapeDtypeStruct
  inputs = pages, new, new, ints((8, 9), jnp.int32), ints((8,), jnp.int32), ints((9,), jnp.int32)
  memory = compile_tpu(write_pages, inputs, target, donate_argnums=0).memory_analysis()
  cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
  assert memory.alias_size_in_bytes >= cache and memory.temp_size_in_bytes < cache / 64


def test_layers_share_pages_by_shifted_tables():
  attend = jax.jit(paged_attention)
  call = make_call([40, 9], page_size=16)
  other = make_call([40, 9], page_size=16, seed=1)
  query, pages, table, *rest = call.arguments
  both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), other.pages, pages)
  np.testing.assert_array_equal(
    attend(query, both, table + other.pages.keys.shape[0], *rest), attend(query, pages, table, *rest)
  )


def test_refuses():
  call = make_call([20, 3])
  query, pages, table, lengths, *_ = call.arguments
  with pytest.raises(ConfigError, match="multiple of K"):
    paged_attention(query[:, :3], pages, table, lengths)
  with pytest.raises(ConfigError, match="no query_starts"):
    paged_attention(query[:1], pages, table, lengths)
  with pytest.raises(ConfigError, match="scales"):
    paged_attention(query, KVPages(pages.keys.astype(jnp.int8), pages.values.astype(jnp.int8)), table, lengths)
  with pytest.raises(ConfigError, match="at least 1"):
    paged_attention(query, pages, table, lengths, window=0)
  with pytest.raises(ConfigError, match="no backend 'cudnn'"):
    paged_attention(query, pages, table, lengths, backend="cudnn")
  with pytest.raises(ConfigError, match="train with flash_attention"):
    jax.grad(lambda q: paged_attention(q, pages, table, lengths).astype(jnp.float32).sum())(query)

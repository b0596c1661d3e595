"""Flash attention's TPU kernels: in the emulator against float64 numpy, and compiled for chips that are not here."""

import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import needs_emulators, tpu_emulator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import Visibility, flash_attention
from jaxllm.kernels.attention import Options, pallas_tpu, pallas_tpu_backward, pallas_tpu_blocks, pallas_tpu_call
from jaxllm.kernels.attention.options import visible

N, K = 2, 1


@pytest.fixture
def tiny(monkeypatch):
  """Blocks of 128, so that short sequences have several."""
  tiles = pallas_tpu.Tiles(128, 128, 128)
  monkeypatch.setattr(pallas_tpu_call, "default_tiles", lambda *_, **__: (tiles, None))


def arrays(B, T, S, H=64, dtype=np.float32, heads=(N, K), seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(B, T, heads[0], H), (B, S, heads[1], H), (B, S, heads[1], H), (B, T, heads[0], H)]
  return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.fixture
def two_kernels(monkeypatch):
  """No room for the sums of all keys."""
  monkeypatch.setattr(pallas_tpu_backward, "in_one", lambda *_: False)


def ours(*several, d_lse=None, sinks=None, target="v5e", **options):
  """For each (query, key, value, d_out), all of one shape: out, lse, and the gradients of query, key, value and sinks.

  Through the public function, compiled once.
  """

  @jax.jit
  def run(q, k, v, d_out, sinks):
    call = lambda q, k, v, sinks: flash_attention(  # noqa: E731
      q, k, v, sinks=sinks, return_lse=True, backend="pallas_tpu", target=target, **options
    )
    (out, lse), pull = jax.vjp(call, q, k, v, sinks)
    # Where a query sees nothing lse is -inf and has no gradient.
    pulled = pull((d_out, jnp.zeros_like(lse) if d_lse is None else jnp.where(lse == -jnp.inf, 0, d_lse)))
    return out, lse, *pulled

  sinks = None if sinks is None else jnp.asarray(sinks, jnp.float32)
  with tpu_emulator():
    return [jax.tree.map(np.asarray, jax.block_until_ready(run(*data, sinks))) for data in several]


def check(data, *, d_lse=None, visibility=Visibility(), offset=None, segments=None, positions=None, prefix=None,
          sinks=None, slopes=None, scale=None, softcap=None, target="v5e", times=1):  # fmt: skip
  q, k, v, d_out = data
  (B, T), S = q.shape[:2], k.shape[1]
  seen = attention_oracle.visible(
    visibility, B, T, S, offset=offset, segments=segments, positions=positions, prefix=prefix
  )
  kept = d_lse if d_lse is None else np.where(seen.any(-1)[:, None], d_lse, 0)
  more = dict(scale=scale, softcap=softcap)
  want = attention_oracle.attention(q, k, v, d_out, seen, d_lse=kept, sinks=sinks, slopes=slopes, offset=offset, **more)
  put = lambda x: None if x is None else jnp.asarray(x)  # noqa: E731
  got, *others = ours(
    *[data] * times, d_lse=d_lse, sinks=sinks, visibility=visibility, query_offset=put(offset),
    prefix_lengths=put(prefix),
    segment_ids=None if segments is None else tuple(map(put, segments)), key_positions=put(positions),
    alibi_slopes=None if slopes is None else jnp.asarray(slopes, jnp.float32), target=target, **more,
  )  # fmt: skip
  wanted = dict(out=want.out, d_query=want.d_query, d_key=want.d_key, d_value=want.d_value)
  half = q.dtype != np.float32
  for (name, b), a in zip(wanted.items(), (got[0], *got[2:5]), strict=True):
    assert a.dtype == q.dtype
    error = (2e-2 if half else 4e-6) * max(1, np.abs(b).max())
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=error, err_msg=name)
  np.testing.assert_allclose(got[1], want.lse, atol=1e-5)
  if sinks is not None:
    np.testing.assert_allclose(got[5], want.d_sinks, rtol=2e-2 if half else 1e-5, atol=1e-1 if half else 1e-4)
  for other in others:
    jax.tree.map(np.testing.assert_array_equal, got, other)  # bitwise
  if sinks is None:
    assert not np.asarray(got[0], np.float32)[~seen.any(-1)].any()  # exactly zero where nothing is seen


def packed(B, T, scattered=False):
  """Documents of different lengths, then padding; scattered: any token of any document."""
  if scattered:
    segments = np.random.default_rng(3).integers(0, 4, (B, T))
    return segments.astype(np.int32), np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
  segments, positions = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
  for b in range(B):
    start = 0
    for document, end in enumerate([T // 3 + T // 15 * b, T - T // 4 * b - T // 30], start=1):
      segments[b, start:end], positions[b, start:end], start = document, np.arange(end - start), end
  return segments, positions


SINKS, SLOPES = np.array([-1.0, 2.0]), np.array([0.25, 0.05])
OPTIONS = {
  "causal": {},
  "bidirectional": dict(visibility=Visibility(causal=False)),
  "window": dict(visibility=Visibility(window=40)),
  "bidirectional-window": dict(visibility=Visibility(causal=False, window=30)),
  "sink-tokens": dict(visibility=Visibility(window=17, sink_tokens=2)),
  "softcap": dict(softcap=0.8, scale=0.7),
  "sinks": dict(sinks=SINKS),
  "alibi": dict(slopes=SLOPES, visibility=Visibility(causal=False)),
  "all": dict(visibility=Visibility(window=60, sink_tokens=1), scale=0.9, softcap=1.5, sinks=SINKS, slopes=SLOPES),
}


FAST = ("causal", "bidirectional-window", "sink-tokens")


@needs_emulators
@pytest.mark.parametrize(
  "name, H",  # sums are turned where H is narrower than the matrix unit, 128 columns
  [
    pytest.param(name, H, marks=() if name in FAST else pytest.mark.slow)
    for name, H in zip(OPTIONS, itertools.cycle((128, 64)))
  ],
)
def test_options(name, H, tiny):
  """Two blocks each way, with ragged tails."""
  T = 200
  d_lse = np.random.default_rng(1).standard_normal((1, N, T)).astype(np.float32)
  check(arrays(1, T, T, H), d_lse=d_lse, **OPTIONS[name])


@needs_emulators
@pytest.mark.parametrize("name, scattered, H", [("causal", False, 128), ("all", True, 64)])
def test_segments(name, scattered, H, tiny):
  T = 300
  segments, positions = packed(2, T, scattered)
  check(arrays(2, T, T, H), segments=(segments, segments), positions=positions, **OPTIONS[name])


@needs_emulators
@pytest.mark.parametrize("name", ["all", pytest.param("causal", marks=pytest.mark.slow)])
def test_two_kernels(name, tiny, two_kernels):
  """Where the sums of all keys have no room."""
  T = 200
  segments, positions = packed(1, T, scattered=name == "all")
  check(arrays(1, T, T), segments=(segments, segments), positions=positions, **OPTIONS[name])


@needs_emulators
@pytest.mark.parametrize(
  "dtype, H, target",
  [
    (jnp.bfloat16, 128, "v5e"),
    (np.float32, 192, "v6e"),  # a matrix unit of 256 columns
    pytest.param(jnp.bfloat16, 96, "v6e", marks=pytest.mark.slow),
    pytest.param(jnp.bfloat16, 256, "v6e", marks=pytest.mark.slow),
  ],
)
def test_dtypes_head_dims_and_groups(dtype, H, target, tiny):
  heads = (4, 2) if H == 128 else (2, 2)
  T = 200
  check(arrays(1, T, T, H, dtype, heads), times=2, target=target)


@needs_emulators
def test_queries_at_an_offset_and_prefixes(tiny):
  """A chunk of queries on a longer cache, each row at its own place; rows of keys that nobody may see yet."""
  check(arrays(2, 140, 300), offset=np.array([3, 160]), visibility=Visibility(window=150), sinks=SINKS, slopes=SLOPES)
  check(arrays(2, 200, 200), prefix=np.array([0, 150]))


@needs_emulators
@pytest.mark.parametrize(
  "T, S", [(5, 77), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(600, 530, marks=pytest.mark.slow)]
)
def test_default_tiles(T, S):
  check(arrays(1, T, S), visibility=Visibility(causal=False))


@pytest.mark.parametrize("target", ["v5e", "v5p", "v6e", "v7"])
def test_one_kernel_where_its_sums_fit(target):
  def fits(T, H, G=1, dtype=jnp.bfloat16):
    query, key = (
      jnp.broadcast_to(jnp.zeros((), dtype), (1, T, G, H)),
      jnp.broadcast_to(jnp.zeros((), dtype), (1, T, 1, H)),
    )
    call = pallas_tpu_call.Call.of(query, key, Options(Visibility(), 1.0), target, backward=True)
    return pallas_tpu_backward.in_one(call, H)

  assert fits(32768, 128, G=8) and fits(16384, 256) and fits(32768, 64, dtype=jnp.float32)
  assert not fits(65536, 128) and not fits(32768, 256)


@needs_emulators
@pytest.mark.slow
@given(st.data())
@settings(
  max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate],
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_pairs_of_options(tiny, data):
  with pytest.MonkeyPatch.context() as patch:
    if data.draw(st.integers(0, 3), "one kernel") == 0:
      patch.setattr(pallas_tpu_backward, "in_one", lambda *_: False)
    check_pair_of_options(data)


def check_pair_of_options(data):
  B, T, S = 2, data.draw(st.integers(1, 200), "T"), data.draw(st.integers(1, 260), "S")
  names = ["window", "two-sided", "segments", "offset", "prefix", "sinks", "slopes", "softcap", "bfloat16"]
  chosen = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True), "options")
  more: dict = {}
  if "offset" in chosen:
    more["offset"] = np.array(data.draw(st.tuples(st.integers(0, S), st.integers(0, S)), "offset"), np.int32)
  if "prefix" in chosen:
    more["prefix"] = np.array(data.draw(st.tuples(st.integers(0, S), st.integers(0, S)), "prefix"), np.int32)
  if "segments" in chosen:
    more["segments"] = packed(B, T)[0], packed(B, S)[0]
  more |= {"sinks": SINKS} if "sinks" in chosen else {}
  more |= {"slopes": SLOPES} if "slopes" in chosen else {}
  more |= {"softcap": 2.0} if "softcap" in chosen else {}
  window = data.draw(st.integers(1, 200), "window") if "window" in chosen else None
  dtype = jnp.bfloat16 if "bfloat16" in chosen else np.float32
  H = data.draw(st.sampled_from([64, 128]), "H")
  check(arrays(B, T, S, H, dtype), visibility=Visibility("two-sided" not in chosen, window), **more)


@needs_emulators
def test_padding_and_hidden_keys_never_leak(tiny):
  """NaN where the segment is 0; whatever is finite in slots of a cache that nobody may see yet."""
  T = 300
  segments, _ = packed(1, T)
  data, poisoned = arrays(1, T, T), arrays(1, T, T)
  for x in poisoned[:3]:
    x[segments == 0] = np.nan
  pair = (jnp.asarray(segments), jnp.asarray(segments))
  jax.tree.map(np.testing.assert_array_equal, *ours(poisoned, data, segment_ids=pair))
  data, poisoned = arrays(1, 8, 250), arrays(1, 8, 250)
  poisoned[1][:, 150:], poisoned[2][:, 150:] = 1e38, -1e38
  jax.tree.map(np.testing.assert_array_equal, *ours(poisoned, data, query_offset=jnp.array([142])))


def options_of(draw, B, T, S):
  """Any visibility, with and without the arrays that move it."""
  v = Visibility(
    draw(st.booleans()), window := draw(st.none() | st.integers(1, 70)), draw(st.integers(0, 3)) if window else 0
  )
  integers = lambda low, high, shape: np.random.default_rng(draw(st.integers(0, 99))).integers(low, high, shape)  # noqa: E731
  arrays = {}
  if draw(st.booleans()):
    arrays["query_offset"] = integers(0, S, B)
  if draw(st.booleans()):
    arrays["prefix_lengths"] = integers(0, S, B)
  if draw(st.booleans()):
    sort = np.sort if draw(st.booleans()) else np.asarray
    arrays["query_segments"], arrays["key_segments"] = sort(integers(0, 4, (B, T))), sort(integers(0, 4, (B, S)))
  if v.sink_tokens and draw(st.booleans()):
    arrays["key_positions"] = integers(0, S, (B, S))
  return Options(v, 1.0, **{name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()})


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
def test_list_of_blocks(data):
  """Every pair with a visible score is visited once, in its place, and masked unless all of it is visible."""
  B, T, S, block_q, block_k = 2, data.draw(st.sampled_from([1, 47, 80])), data.draw(st.sampled_from([5, 96])), 16, 32
  options = options_of(data.draw, B, T, S)
  offset = jnp.zeros(B, jnp.int32) if options.query_offset is None else options.query_offset
  row = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
  row = {name: x for name, x in row.items() if name in ("query_segments", "key_segments", "key_positions")}
  row = {n: x[:, :, None] if n.startswith("query") else x[:, None] for n, x in row.items() if x is not None}
  if options.prefix_lengths is not None:
    row["prefix_length"] = options.prefix_lengths[:, None, None]
  at = offset[:, None, None] + jnp.arange(T)[:, None]
  seen = np.broadcast_to(visible(options, at, jnp.arange(S)[None, None], row), (B, T, S))
  for outside in (False, True):
    table, steps = pallas_tpu_blocks.pairs(options, T, S, block_q, block_k, outside)
    lists = np.asarray(table)
    assert len(lists) == 1 or pallas_tpu_blocks.depends_on_data(options)
    for b in range(B):
      entries = lists[b if len(lists) > 1 else 0]
      places = np.stack(pallas_tpu_blocks.place(entries), 1)
      visits = {}
      for (i, j), entry in zip(places.tolist(), entries[: int(steps)].tolist()):
        if entry & pallas_tpu_blocks.RUN:
          assert (i, j) not in visits
          visits[i, j] = bool(entry & pallas_tpu_blocks.MASK)
      for i in range(-(-T // block_q)):
        for j in range(-(-S // block_k)):
          part = seen[b, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
          assert (i, j) in visits or not part.any()
          assert visits.get((i, j), True) or part.all()
          if part.all() and part.shape == (block_q, block_k) and not options.asked - {"causal", "window"}:
            assert not visits[i, j]  # no mask without need
      # Each block of the outer side: one run of entries, from FIRST to LAST.
      outer = places[:, int(outside)]
      real = entries & (pallas_tpu_blocks.FIRST | pallas_tpu_blocks.LAST | pallas_tpu_blocks.RUN) != 0
      for block in range(-(-S // block_k) if outside else -(-T // block_q)):
        mine = entries[real & (outer == block)]
        assert mine[0] & pallas_tpu_blocks.FIRST and mine[-1] & pallas_tpu_blocks.LAST
        assert (mine & pallas_tpu_blocks.FIRST != 0).sum() == (mine & pallas_tpu_blocks.LAST != 0).sum() == 1
        assert (np.diff(np.flatnonzero(real & (outer == block))) == 1).all()


def test_packed_rows_visit_only_their_documents():
  """8 documents of 512 in a row of 4096: as many pairs as 8 short rows have."""
  ids = jnp.repeat(jnp.arange(1, 9), 512)[None]
  options = Options(Visibility(), 1.0, query_segments=ids, key_segments=ids)
  assert int(pallas_tpu_blocks.pairs(options, 4096, 4096, 256, 256, False)[1]) == 8 * 3
  assert pallas_tpu_blocks.pairs(Options(Visibility(), 1.0), 4096, 4096, 256, 256, False)[1] == 16 * 17 // 2
  window = Options(Visibility(window=256), 1.0)
  assert pallas_tpu_blocks.pairs(window, 4096, 4096, 256, 256, False)[1] == 16 + 15


@needs_emulators
@pytest.mark.parametrize(
  "shape, dtype, reason",
  [((1, 8, 2, 64), jnp.float16, "bfloat16 or float32"), ((1, 8, 2, 1024), jnp.float32, "head dims")],
)
def test_refusals(shape, dtype, reason):
  x = jnp.zeros(shape, dtype)
  with pytest.raises(ConfigError, match=reason):
    flash_attention(x, x, x, backend="pallas_tpu", target="v5e")
  with pytest.raises(ConfigError, match="multiples of 128"):
    pallas_tpu.Tiles(100, 128, 128).fitted(8, 8)


# ---------------------------------------------------------------- compiled ahead of time

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
SHAPES = {  # B, T, S, N, K, H
  "llama": ((1, 4096, 4096, 32, 8, 128), {}),
  "narrow": ((1, 4096, 4096, 16, 16, 64), {}),
  "gemma": ((1, 4096, 4096, 16, 8, 256), dict(softcap=50.0)),
  "packed": ((2, 4096, 4096, 32, 8, 128), dict(visibility=Visibility(window=1024), segment_ids=True)),
  "ragged": ((1, 4000, 4000, 32, 8, 128), {}),
  "long": ((1, 32768, 32768, 32, 8, 128), {}),
  "longer": ((1, 65536, 65536, 8, 1, 128), {}),  # sums of all keys do not fit: two kernels for the gradients
  "cached": ((2, 333, 5000, 8, 1, 80), dict(query_offset=True, prefix_lengths=True, alibi_slopes=True, sinks=True)),
  "float32": ((1, 2048, 2048, 8, 8, 128), {}),
}


def count_of_kernels(name, chip):
  return 3 if name == "longer" or (name, chip) == ("long", "v4") else 2


def call_and_avals(name, target):
  """The forward and backward pass of one row of SHAPES."""
  (B, T, S, heads, kv_heads, H), asked = SHAPES[name]
  dtype = jnp.float32 if name == "float32" else jnp.bfloat16
  of = jax.ShapeDtypeStruct
  shapes = dict(segment_ids=((B, T), (B, S)), query_offset=(B,), prefix_lengths=(B,), alibi_slopes=(heads,))
  integers = {n: s for n, s in shapes.items() if n in asked and n != "alibi_slopes"}
  given = {
    n: jax.tree.map(lambda s: of(s, jnp.int32), s, is_leaf=lambda s: isinstance(s[0], int)) for n, s in integers.items()
  }
  given |= {n: of((heads,), jnp.float32) for n in ("alibi_slopes", "sinks") if n in asked}
  static = {n: x for n, x in asked.items() if n not in given}

  def step(q, k, v, given):
    call = lambda q, k, v: flash_attention(q, k, v, backend="pallas_tpu", target=target, **given, **static)  # noqa: E731
    out, pull = jax.vjp(call, q, k, v)
    return out, *pull(out)

  keys = of((B, S, kv_heads, H), dtype)
  return step, (of((B, T, heads, H), dtype), keys, keys, given)


def compiled(name, chip):
  sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
  from machine_code import compile_tpu

  return compile_tpu(*call_and_avals(name, chip), chip)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "v7"])
def test_compiles_and_fits(chip):
  """Vector memory included: a kernel that asks for too much does not compile."""
  assert compiled("ragged", chip).as_text().count('custom_call_target="tpu_custom_call"') == 2


# Each shape for a chip with much vector memory and for one with little.
TWO_CHIPS = [
  (n, chip) for i, n in enumerate(SHAPES) for chip in (("v5e", "v7"), ("v6e", "v5p"))[i % 2] if n != "ragged"
]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name, chip", [*TWO_CHIPS, ("long", "v4"), ("cached", "v4")])
def test_compiles_at_real_shapes(name, chip):
  text = compiled(name, chip).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == count_of_kernels(name, chip)


@needs_libtpu
@pytest.mark.slow
def test_memory_grows_with_length_only():
  """Eight times the length, no more than eight times the temporary bytes (scores alone would be 64 times)."""
  short, long = (compiled(name, "v5e").memory_analysis().temp_size_in_bytes for name in ("llama", "long"))
  # The shorter one's temporary arrays may have found a place in other buffers: beside the arguments they count.
  inputs = 4096 * (2 * 32 + 2 * 8) * 128 * 2
  assert long < 8 * (short + inputs), (short, long)


@needs_emulators
@pytest.mark.parametrize("name", SHAPES)
def test_lowers(name):
  """Without libtpu too."""
  step, avals = call_and_avals(name, "v5e")
  text = jax.jit(step).trace(*avals).lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("@tpu_custom_call(") == count_of_kernels(name, "v5e")

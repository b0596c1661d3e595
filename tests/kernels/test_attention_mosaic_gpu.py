"""Hopper's attention forward: in the emulator against float64, and as machine code for an H100."""

import random
from unittest import mock

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import gpu_emulator, needs_emulators
from hopper_code import ATTENTION, MORE_ATTENTION, SEGMENTED, attention_shapes, can_compile, check_machine_code
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import Visibility, flash_attention
from jaxllm.kernels.attention.api import OP
from jaxllm.kernels.attention.options import Options
from jaxllm.kernels.dispatch import Call

pytestmark = needs_emulators
SMALL = dict(block_kv=64, stages=2)  # blocks as small as wgmma and its swizzle allow


def packed(B, T, documents=3, padding=9, seed=0):
  """Segments and positions of rows that hold several documents and then padding."""
  rng = np.random.default_rng(seed)
  segments = np.sort(rng.integers(1, documents + 1, (B, T)), 1).astype(np.int32)
  segments[:, T - padding :] = 0
  positions = np.zeros_like(segments)
  for t in range(1, T):
    positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
  return segments, positions


def call(q, k, v, small=True, **options):
  from jaxllm.kernels.attention import mosaic_gpu

  @jax.jit
  def run(q, k, v):
    return flash_attention(q, k, v, return_lse=True, backend="mosaic_gpu", **options)

  tiles = (lambda *_: mosaic_gpu.Tiles(**SMALL)) if small else mosaic_gpu._tiles
  with mock.patch.object(mosaic_gpu, "_tiles", tiles), gpu_emulator(120):
    return jax.block_until_ready(run(q, k, v))


def check(B=1, T=100, S=None, N=2, K=1, H=64, dtype=jnp.bfloat16, visibility=Visibility(), small=True, **options):
  """One call against the oracle; returns what came out."""
  S = S or T
  rng = np.random.default_rng(T)
  q, k, v = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((B, T, N, H), (B, S, K, H), (B, S, K, H)))
  arrays = {n: x if x is None or isinstance(x, float) else jax.tree.map(jnp.asarray, x) for n, x in options.items()}
  got, lse = call(q, k, v, small, visibility=visibility, **arrays)
  seen = attention_oracle.visible(
    visibility, B, T, S,
    offset=options.get("query_offset"), segments=options.get("segment_ids"),
    positions=options.get("key_positions"), prefix=options.get("prefix_lengths"),
  )  # fmt: skip
  want = attention_oracle.attention(
    q, k, v, np.zeros(q.shape), seen,
    scale=options.get("scale"), softcap=options.get("softcap"), sinks=options.get("sinks"),
    slopes=options.get("alibi_slopes"), offset=options.get("query_offset"),
  )  # fmt: skip
  assert got.dtype == dtype and lse.dtype == jnp.float32 and lse.shape == (B, N, T)
  np.testing.assert_allclose(np.float64(got), want.out, rtol=0, atol=0.012 * max(1, np.abs(want.out).max()))
  np.testing.assert_allclose(lse, want.lse, rtol=2e-6, atol=2e-5)
  hidden = ~seen.any(-1)
  assert not np.asarray(got)[hidden].any()  # exactly zero where nothing is seen
  return got, lse


SEGMENTS, POSITIONS = packed(1, 200)
SINKS, SLOPES = np.float32([0.5, -1.0]), np.float32([0.5, 0.25])
MIXED = np.random.default_rng(0).integers(0, 3, (1, 200)).astype(np.int32)  # every block has every segment
CASES = {
  "causal": dict(T=200),
  "short": dict(T=1, S=3),
  "bidirectional": dict(T=130, S=200, visibility=Visibility(causal=False)),
  "heads": dict(B=2, T=70, N=4, K=2, H=80, dtype=jnp.float16),
  "fewer-keys": dict(T=100, S=60, scale=-0.3),
  "window": dict(T=260, visibility=Visibility(window=40)),
  "bidirectional-window": dict(T=200, visibility=Visibility(causal=False, window=30), softcap=2.0),
  "packed": dict(T=200, segment_ids=(SEGMENTS, SEGMENTS), sinks=SINKS),
  "packed-sink-tokens": dict(
    T=200, segment_ids=(SEGMENTS, SEGMENTS), key_positions=POSITIONS, visibility=Visibility(window=20, sink_tokens=3)
  ),
  "interleaved": dict(T=130, S=200, segment_ids=(MIXED[:, :130], MIXED), visibility=Visibility(causal=False)),
  "offsets": dict(
    B=2, T=70, S=330, query_offset=np.int32([130, 40]), prefix_lengths=np.int32([70, 0]),
    visibility=Visibility(window=30, sink_tokens=2), alibi_slopes=SLOPES, sinks=SINKS,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_options(name):
  check(**CASES[name])


@pytest.mark.parametrize("H, softcap", [(128, None), (256, 20.0)])
def test_the_blocks_of_a_head_dim(H, softcap):
  check(T=100, S=160, H=H, softcap=softcap, small=False)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_pairs_of_options(data):
  draw = data.draw
  T, S = draw(st.integers(64, 300), label="T"), draw(st.integers(64, 300), label="S")
  of_queries, _ = packed(1, T, seed=T)
  of_keys, positions = packed(1, S, seed=S)
  sink_tokens = draw(st.sampled_from([0, 3]))
  options = dict(
    query_offset=np.int32([draw(st.integers(0, 200))]),
    prefix_lengths=np.int32([draw(st.integers(0, S))]),
    segment_ids=(of_queries, of_keys),
    key_positions=positions if sink_tokens else None,
    alibi_slopes=SLOPES,
    sinks=SINKS,
    softcap=1.5,
    scale=draw(st.sampled_from([0.1, 0.3])),
  )
  for name in draw(
    st.lists(st.sampled_from([n for n in options if n != "key_positions"]), max_size=5), label="without"
  ):
    options.pop(name, None)
  v = Visibility(draw(st.booleans()), draw(st.sampled_from([None, 1, 50])), sink_tokens)
  check(T=T, S=S, visibility=v, dtype=draw(st.sampled_from([jnp.bfloat16, jnp.float16])), **options)


def test_padding_does_not_leak_and_twice_is_the_same():
  rng = np.random.default_rng(0)
  T = 150
  q, k, v = (jnp.asarray(rng.standard_normal((1, T, 1, 64)), jnp.bfloat16) for _ in range(3))
  ids = np.where(np.arange(T) < 120, 1, 0).astype(np.int32)[None]
  poisoned = [jnp.where(ids[:, :, None, None] == 0, jnp.nan, x) for x in (q, k, v)]
  pair = (jnp.asarray(ids), jnp.asarray(ids))
  clean, again, dirty = (call(*x, segment_ids=pair) for x in ((q, k, v), (q, k, v), poisoned))
  for a, b, c in zip(clean, again, dirty):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
  assert np.isfinite(np.asarray(dirty[0], np.float32)).all()


@pytest.mark.parametrize(
  "change, reason",
  [
    (dict(dtype=jnp.float32), "float32"),
    (dict(H=320), "head dim"),
    (dict(S=0), "no keys"),
    (dict(target="a100"), "no backend"),
  ],
)
def test_refusals(change, reason):
  shape = dict(dtype=jnp.bfloat16, H=64, S=8, target="h100") | change
  q, k = (jnp.zeros((1, length, 1, shape["H"]), shape["dtype"]) for length in (8, shape["S"]))
  with pytest.raises(ConfigError, match=reason):
    flash_attention(q, k, k, backend="mosaic_gpu", target=shape["target"])


TILES = 20  # tiles of the longest row below


def visited_by_tile(options, which, T, S, block_q, block_kv, offset, prefix):
  """Per tile of queries (or of keys): how many blocks it visits, how many without a mask, and in which order."""
  from jaxllm.kernels.attention import mosaic_gpu_common as common

  ranges = jnp.zeros((TILES, 4), jnp.int32)
  if options.query_segments is not None:
    both = [(common.query_arrays(options, block_q), block_q), (common.key_arrays(options, block_kv)[:, 0], block_kv)]
    (rows, row_block), (columns, column_block) = both if which == "keys" else both[::-1]
    found = common.segment_ranges(rows, columns, row_block, column_block)[0]
    ranges = ranges.at[: len(found)].set(found)

  def visits(t, ranges):
    segments = None if options.query_segments is None else tuple(ranges)
    if which == "keys":
      first, last = t * block_q + offset, jnp.minimum((t + 1) * block_q, T) - 1 + offset
      found = common.key_visits(options, first, last, S, block_kv, prefix, segments)
    else:
      first, last = t * block_kv, jnp.minimum((t + 1) * block_kv, S) - 1
      found = common.query_visits(options, first, last, T, block_q, offset, prefix, segments)
    return found.count, found.full_count, found.block(jnp.arange(TILES))

  return map(np.asarray, jax.vmap(visits)(jnp.arange(TILES), ranges))


@pytest.mark.parametrize("which", ["keys", "queries"])
def test_blocks_visited_are_those_with_something_to_see(which):
  """Whatever is visible is visited once; blocks without a mask are seen wholly; and nothing is visited in vain."""
  rng = random.Random(0)
  for trial in range(25):
    T, S, block_q, block_kv = rng.choice([5, 64, 70]), rng.choice([7, 64, 81]), rng.choice([4, 8]), rng.choice([8, 16])
    window = rng.choice([None, 1, 3, 9, 30])
    v = Visibility(rng.random() < 0.5, window, rng.choice([0, 5]) if window else 0)
    offset, prefix = rng.choice([0, rng.randint(0, 40)]), rng.choice([None, rng.randint(0, S)])
    segments = positions = None
    if rng.random() < 0.5:
      numbers = np.random.default_rng(trial)
      segments = [numbers.integers(0, 4, (1, n)).astype(np.int32) for n in (T, S)]
      segments = [np.sort(x) for x in segments] if rng.random() < 0.7 else segments
      positions = numbers.integers(0, 30, (1, S)).astype(np.int32) if v.sink_tokens else None
    prefixes = None if prefix is None else np.array([prefix])
    options = Options(v, 1.0, None, None, *(segments or (None, None)), positions, prefixes)
    seen = attention_oracle.visible(
      v, 1, T, S, offset=[offset], segments=segments, positions=positions, prefix=prefixes
    )[0]
    counts, full_counts, orders = visited_by_tile(options, which, T, S, block_q, block_kv, offset, prefix)
    seen, rows, columns = (seen, block_q, block_kv) if which == "keys" else (seen.T, block_kv, block_q)
    blocks = range(-(-seen.shape[1] // columns))
    for t in range(-(-seen.shape[0] // rows)):
      tile = seen[t * rows : (t + 1) * rows]
      parts = [tile[:, b * columns : (b + 1) * columns] for b in blocks]
      visited = orders[t, : counts[t]].tolist()
      plain, others = visited[: full_counts[t]], visited[full_counts[t] :]
      assert len(set(visited)) == len(visited) and set(visited) <= set(blocks)
      assert {b for b in blocks if parts[b].any()} <= set(visited)
      assert all(parts[b].all() for b in plain)
      if not segments and not v.sink_tokens and prefix is None:
        assert all(parts[b].any() for b in visited)
        short = which == "keys" and S % block_kv  # keys behind the end are masked
        assert not any(parts[b].all() for b in others if not (short and b == blocks[-1]))


# ---------------------------------------------------------------- machine code


def compiled(B, T, N, K, H, visibility=Visibility(), softcap=None, arrays=()):
  """The compiled call, once its machine code is as it should be."""
  q, k, arrays = attention_shapes(B, T, N, K, H, arrays)

  def run(q, k, v, arrays):
    from jaxllm.kernels.attention import mosaic_gpu

    return mosaic_gpu.forward(Call(OP, "mosaic_gpu", "h100"), q, k, v, Options(visibility, H**-0.5, softcap, **arrays))

  return check_machine_code(run, (q, k, k, arrays))


@can_compile
@pytest.mark.parametrize("name", ATTENTION)
def test_machine_code(name):
  compiled(**ATTENTION[name])


@can_compile
@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_ATTENTION)
def test_machine_code_of_more(name):
  compiled(**MORE_ATTENTION[name])


@can_compile
def test_memory_grows_with_length_and_not_its_square():
  """With all that is copied: odd lengths, and segments that are looked at before the kernel."""
  short, long = (
    compiled(B=1, T=T, N=8, K=2, H=128, arrays=SEGMENTED).memory_analysis().temp_size_in_bytes for T in (4001, 8001)
  )
  assert long <= 2.1 * short

"""Hopper's attention backward: in the emulator against float64, and as machine code for an H100."""

import dataclasses

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulators import gpu_emulator, needs_emulators
from hopper_code import ATTENTION, MORE_ATTENTION, SEGMENTED, attention_shapes, can_compile, check_machine_code
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.kernels import Visibility, flash_attention, tuning
from jaxllm.kernels.attention.api import OP
from jaxllm.kernels.attention.options import Options
from jaxllm.kernels.dispatch import Call

pytestmark = needs_emulators


def small(split=False):
  """Blocks as small as wgmma allows, and two slots, so that short rows take many steps and use slots again."""
  from jaxllm.kernels.attention import mosaic_gpu_backward

  return mosaic_gpu_backward.Tiles(keys=64, key_slots=2, value_slots=1, queries=64, query_slots=2, split=split)


def packed(T, documents=3, padding=9, seed=0):
  """Segments and positions of a row that holds several documents and then padding."""
  segments = np.sort(np.random.default_rng(seed).integers(1, documents + 1, (1, T)), 1).astype(np.int32)
  segments[:, T - padding :] = 0
  positions = np.zeros_like(segments)
  for t in range(1, T):
    positions[:, t] = np.where(segments[:, t] == segments[:, t - 1], positions[:, t - 1] + 1, 0)
  return segments, positions


def random_arrays(B, T, S, N, K, H, dtype, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
  return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def run(q, k, v, d_out, options, lse, delta, tiles):
  from jaxllm.kernels.attention import mosaic_gpu_backward

  @jax.jit
  def call(q, k, v, d_out, options, lse, delta):
    return mosaic_gpu_backward.backward(Call(OP, "mosaic_gpu", "h100"), q, k, v, options, lse, d_out, delta)

  with tuning.trying("attention_backward", dataclasses.asdict(tiles)), gpu_emulator(150):
    return jax.block_until_ready(call(q, k, v, d_out, options, jnp.float32(lse), jnp.float32(delta)))


def close(got, want, dtype):
  assert got.shape == want.shape and got.dtype == dtype
  np.testing.assert_allclose(np.float64(got), want, rtol=0, atol=0.012 * max(1, np.abs(want).max()))


def oracle(arrays, visibility, *, d_lse=None, **options):
  """The oracle's gradients, and what `backward` is given: (result, options, lse, delta)."""
  q, k, v, d_out = arrays
  (B, T), S = q.shape[:2], k.shape[1]
  seen = attention_oracle.visible(
    visibility, B, T, S,
    offset=options.get("query_offset"), segments=options.get("segment_ids"),
    positions=options.get("key_positions"), prefix=options.get("prefix_lengths"),
  )  # fmt: skip
  scale = options.get("scale", q.shape[3] ** -0.5)
  result = attention_oracle.attention(
    q, k, v, d_out, seen,
    d_lse=d_lse, scale=scale, softcap=options.get("softcap"), sinks=options.get("sinks"),
    slopes=options.get("alibi_slopes"), offset=options.get("query_offset"),
  )  # fmt: skip
  delta = np.einsum("bthd,bthd->bht", result.out, np.float64(d_out))
  delta -= 0 if d_lse is None else d_lse
  segments = dict(zip(("query_segments", "key_segments"), options.pop("segment_ids", ())))
  arrays = {n: x if isinstance(x, float) else jnp.asarray(x) for n, x in (options | segments).items() if x is not None}
  return result, Options(visibility, arrays.pop("scale", scale), **arrays), result.lse, delta


def check(T=100, S=None, B=1, N=2, K=1, H=64, dtype=jnp.bfloat16, visibility=Visibility(), tiles=None, **options):
  """One call against the oracle."""
  arrays = random_arrays(B, T, S or T, N, K, H, dtype, seed=T)
  d_lse = np.random.default_rng(1).standard_normal((B, N, T))
  want, options, lse, delta = oracle(arrays, visibility, d_lse=d_lse, **options)
  got = run(*arrays, options, lse, delta, tiles or small())
  for name, gradient in zip(("d_query", "d_key", "d_value"), got, strict=True):
    close(gradient, getattr(want, name), dtype)
  assert not np.asarray(got[0])[np.isneginf(lse).swapaxes(1, 2)].any()  # exactly zero where nothing is seen


SEGMENTS, POSITIONS = packed(200)
SINKS, SLOPES = np.float32([0.5, -1.0]), np.float32([0.5, 0.25])
CASES = {
  "causal": dict(T=330),
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
  "offsets": dict(
    B=2, T=70, S=330, query_offset=np.int32([130, 40]), prefix_lengths=np.int32([70, 0]),
    visibility=Visibility(window=30, sink_tokens=2), alibi_slopes=SLOPES, sinks=SINKS,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_options(name):
  check(**CASES[name])


@pytest.mark.parametrize("name", ["causal", "bidirectional-window"])
def test_two_warpgroups_for_the_same_keys(name):
  check(**CASES[name], tiles=small(split=True))


@pytest.mark.parametrize("H, softcap", [(128, None), (192, None), (256, 20.0)])
def test_the_blocks_of_a_head_dim(H, softcap):
  from jaxllm.kernels.attention import mosaic_gpu_backward

  check(T=100, S=160, H=H, softcap=softcap, tiles=mosaic_gpu_backward._tiles(H))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(st.data())
def test_pairs_of_options(data):
  draw = data.draw
  T, S = draw(st.integers(64, 250), label="T"), draw(st.integers(64, 250), label="S")
  of_keys, positions = packed(S, seed=S)
  sink_tokens = draw(st.sampled_from([0, 3]))
  options = dict(
    query_offset=np.int32([draw(st.integers(0, 200))]),
    prefix_lengths=np.int32([draw(st.integers(0, S))]),
    segment_ids=(packed(T, seed=T)[0], of_keys),
    alibi_slopes=SLOPES,
    sinks=SINKS,
    softcap=1.5,
    scale=draw(st.sampled_from([0.1, 0.3])),
  )
  for name in draw(st.lists(st.sampled_from(list(options)), max_size=5), label="without"):
    options.pop(name, None)
  if sink_tokens:
    options["key_positions"] = positions
  v = Visibility(draw(st.booleans()), draw(st.sampled_from([None, 1, 50])), sink_tokens)
  check(T=T, S=S, visibility=v, dtype=draw(st.sampled_from([jnp.bfloat16, jnp.float16])), **options)


def test_padding_does_not_leak_and_twice_is_the_same():
  """Whatever the gradient of padding's results is, nothing of it arrives; the second call gives the same bits."""
  T = 200
  q, k, v, d_out = random_arrays(1, T, T, 2, 1, 64, jnp.bfloat16)
  padding = SEGMENTS == 0
  q, k, v = (jnp.where(padding[:, :, None, None], 0, x) for x in (q, k, v))
  poisoned = jnp.where(padding[:, :, None, None], 1e30, d_out)
  _, options, lse, delta = oracle((q, k, v, d_out), Visibility(), segment_ids=(SEGMENTS, SEGMENTS))
  dirty_delta = np.where(padding[:, None], np.nan, delta)
  clean, again, dirty = (
    run(q, k, v, d, options, lse, x, small()) for d, x in ((d_out, delta), (d_out, delta), (poisoned, dirty_delta))
  )
  for a, b, c in zip(clean, again, dirty):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    assert not np.asarray(a)[padding].any() and np.isfinite(np.asarray(a, np.float32)).all()


def test_through_flash_attention():
  """jax.grad of the public function, with gradients of lse and sinks."""
  arrays = random_arrays(1, 100, 100, 2, 1, 64, jnp.bfloat16)
  d_lse = np.random.default_rng(1).standard_normal((1, 2, 100))
  want, *_ = oracle(arrays, Visibility(), d_lse=d_lse, sinks=SINKS)

  def loss(q, k, v, sinks):
    out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True, backend="mosaic_gpu", target="h100")
    return jnp.sum(out.astype(jnp.float32) * arrays[3]) + jnp.sum(lse * d_lse)

  with gpu_emulator(150):
    got = jax.block_until_ready(jax.jit(jax.grad(loss, range(4)))(*arrays[:3], jnp.asarray(SINKS)))
  for name, gradient in zip(("d_query", "d_key", "d_value"), got):
    close(gradient, getattr(want, name), jnp.bfloat16)
  np.testing.assert_allclose(got[3], want.d_sinks, atol=0.02 * np.abs(want.d_sinks).max() + 0.02)


# ---------------------------------------------------------------- machine code


def compiled(B, T, N, K, H, visibility=Visibility(), softcap=None, arrays=()):
  """The compiled call, once the machine code of its two kernels is as it should be."""
  q, k, arrays = attention_shapes(B, T, N, K, H, arrays)
  of_rows = jax.ShapeDtypeStruct((B, N, T), jnp.float32)

  def call(q, k, v, d_out, lse, delta, arrays):
    from jaxllm.kernels.attention import mosaic_gpu_backward

    options = Options(visibility, H**-0.5, softcap, **arrays)
    return mosaic_gpu_backward.backward(Call(OP, "mosaic_gpu", "h100"), q, k, v, options, lse, d_out, delta)

  return check_machine_code(call, (q, k, k, q, of_rows, of_rows, arrays), kernels=2)


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

"""cuDNN's attention within segments: the mask that is handed to it, its packed layout, and what is kept of them.

The library is not here (`cudnn_stand_in`): what is tested is all that stands around it, and that it lowers.
"""

import attention_oracle as oracle
import cudnn_stand_in
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import Visibility, backends, flash_attention
from jaxllm.kernels.attention import cudnn, cudnn_packed
from jaxllm.kernels.attention.options import Options

N, K, H = 4, 2, 16
can_pack = pytest.mark.skipif(
  jax.__version_info__ < (0, 11, 2), reason="jax's offsets of grouped keys are wrong before"
)

# Rows of segments of 32 tokens; M is 8 there.
ROWS = {
  "packed": [1] * 7 + [2] * 20 + [3] * 5,
  "padded": [1] * 9 + [4] * 3 + [0] * 20,
  "padding between": [0] * 3 + [2] * 4 + [0] * 2 + [3] * 20 + [0] * 3,
  "padding only": [0] * 32,
  "as many as there is room for": [i // 4 + 1 for i in range(32)],
  "one": [5] * 32,
}
OTHER_ROWS = {  # which the layout does not hold
  "more than there is room for": [i // 3 + 1 for i in range(32)],
  "falling": [2] * 16 + [1] * 16,
  "in two parts": [1] * 10 + [2] * 10 + [1] * 12,
  "around padding": [1] * 10 + [0] * 2 + [1] * 20,
}


def drawn(B, T=32):
  rng = np.random.default_rng(0)
  shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
  return [np.asarray(jnp.asarray(rng.standard_normal(s), jnp.bfloat16), np.float32) for s in shapes]


def check(segments, visibility, backend):
  """Result and gradients against float64; NaN stands where there is padding."""
  segments = np.asarray(segments, np.int32)
  q, k, v, d_out = drawn(len(segments), segments.shape[1])
  seen = oracle.visible(visibility, *segments.shape, segments.shape[1], segments=(segments, segments))
  want = oracle.attention(q, k, v, d_out, seen)
  padding = (segments == 0)[:, :, None, None]
  q, k, v = (jnp.asarray(np.where(padding, np.nan, x), jnp.bfloat16) for x in (q, k, v))

  def attend(q, k, v):
    both = segments, segments
    return flash_attention(q, k, v, visibility=visibility, segment_ids=both, backend=backend, target="h100")

  def run(q, k, v, d_out):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)

  got = jax.jit(run)(q, k, v, jnp.asarray(d_out, jnp.bfloat16))
  for x, wanted in zip(got, (want.out, want.d_query, want.d_key, want.d_value)):
    np.testing.assert_allclose(np.asarray(x, np.float64), wanted, atol=0.06)
  np.testing.assert_array_equal(np.where(padding, got[0], 0), 0)


# ---------------------------------------------------------------- the mask


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_masked(causal, window, monkeypatch):
  calls = cudnn_stand_in.compute_masked(monkeypatch)
  check([*ROWS.values(), *OTHER_ROWS.values()], Visibility(causal, window), "cudnn")
  assert calls and all(call["mask"] is not None for call in calls)


def test_queries_of_a_segment_without_keys_give_zeros(monkeypatch):
  cudnn_stand_in.compute_masked(monkeypatch)
  q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in drawn(1))
  segments = jnp.full((1, 32), 7), jnp.full((1, 32), 8)
  out = flash_attention(q, k, v, visibility=Visibility(False), segment_ids=segments, backend="cudnn", target="h100")
  assert not out.any()


def test_a_window_on_both_sides_is_a_mask(monkeypatch):
  """cuDNN has none."""
  calls = cudnn_stand_in.compute_masked(monkeypatch)
  q, k, v, d_out = drawn(2)
  visibility = Visibility(causal=False, window=6)
  want = oracle.attention(q, k, v, d_out, oracle.visible(visibility, 2, 32, 32)).out
  got = flash_attention(
    *(jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)), visibility=visibility, backend="auto", target="a100"
  )
  np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.03)
  assert len(calls) == 1


def kept(backend, T, segmented=True):
  """Sizes of what the backward pass keeps of a call."""
  q, k = (jax.ShapeDtypeStruct((1, T, heads, 64), jnp.bfloat16) for heads in (N, K))
  segments = jax.ShapeDtypeStruct((1, T), jnp.int32)

  def residuals(q, k, v, s):
    attend = lambda q, k, v: flash_attention(  # noqa: E731
      q, k, v, segment_ids=(s, s) if segmented else None, backend=backend, target="h100"
    )
    return jax.vjp(attend, q, k, v)[1]

  return [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(residuals, q, k, k, segments))]


def test_layers_do_not_keep_their_masks(monkeypatch):
  cudnn_stand_in.allow_lowering(monkeypatch)
  T = 1024
  assert max(kept("cudnn", T)) < T * T
  monkeypatch.setattr(cudnn, "keep_results", lambda attend: attend)
  assert max(kept("cudnn", T)) >= T * T, "this test cannot fail"


@pytest.mark.parametrize(
  "shape, message",
  [
    ((1, 32, N, 20), "multiples of 8"),
    ((1, 33, N, 16), "even lengths"),
    ((1, 32, N, 264), "head dims up to 256"),
  ],
)
def test_what_cudnn_refuses_is_said_here(shape, message):
  x = jnp.zeros(shape, jnp.bfloat16)
  segments = jnp.ones(shape[:2], jnp.int32)
  with pytest.raises(ConfigError, match=message):
    flash_attention(x, x, x, segment_ids=(segments, segments), backend="cudnn", target="h100")


# ---------------------------------------------------------------- which one "auto" takes


def taken(B, T, target, heads=N):
  """What is chosen for packed rows; nothing is computed."""
  q = jax.ShapeDtypeStruct((B, T, heads, 64), jnp.bfloat16)
  segments = jax.ShapeDtypeStruct((B, T), jnp.int32)
  before = dict(backends._logged)
  backends._logged.clear()
  try:
    jax.eval_shape(lambda q, s: flash_attention(q, q, q, segment_ids=(s, s), target=target), q, segments)
    return backends.chosen("packed_attention", target)
  finally:
    backends._logged.update(before)


def test_packed_rows_on_hopper_take_what_has_run(monkeypatch):
  cudnn_stand_in.allow_lowering(monkeypatch)
  ((backend, why),) = taken(1, 8192, "h100").items()
  assert backend == "cudnn" and "mosaic_gpu" in why
  if jax.__version_info__ >= (0, 11, 2):
    assert why == "cudnn_packed, mosaic_gpu: not measured on this chip"


def test_a_large_mask_is_passed_over_for_what_grows_with_the_length(monkeypatch):
  cudnn_stand_in.allow_lowering(monkeypatch)
  ((backend, why),) = taken(2, 1 << 15, "h100").items()
  assert backend == "xla" and "GiB" in why
  monkeypatch.setitem(backends.MEASURED, ("packed_attention", "mosaic_gpu"), {"h200": "…"})
  assert set(taken(2, 1 << 15, "h100")) == {"xla"}  # another chip's record
  if jax.__version_info__ >= (0, 11):
    assert set(taken(2, 1 << 15, "h200")) == {"mosaic_gpu"}


def test_a_gradient_of_the_mask_counts(monkeypatch):
  """jax before 0.11.2 has cuDNN make one, with heads."""
  q = jax.ShapeDtypeStruct((1, 16384, 8, 64), jnp.bfloat16)
  options = Options(Visibility(), 1.0, query_segments=q, key_segments=q)
  for version, large in (((0, 10, 2), True), ((0, 11, 2), False)):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert bool(cudnn.quadratic(None, q, q, q, options)) == large


# ---------------------------------------------------------------- the packed layout


@pytest.mark.parametrize("name", ROWS | OTHER_ROWS)
def test_layout(name):
  """Against a loop in Python."""
  row = (ROWS | OTHER_ROWS)[name]
  runs = [i for i, s in enumerate(row) if s and (i == 0 or row[i - 1] != s)]
  offsets, lengths, fits = cudnn_packed.layout(jnp.asarray([row]), cudnn_packed.most_segments(len(row)))
  assert bool(fits) == (name in ROWS)
  if name in ROWS:
    ends = [next((j for j in range(i, 32) if row[j] != row[i]), 32) for i in runs]
    fill = [-1] * (8 - len(runs))
    assert offsets[0].tolist() == [*runs, *fill, -1]
    assert lengths[0].tolist() == [*(end - start for start, end in zip(runs, ends)), *fill]


@can_pack
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [ROWS, *({name: row, "packed": ROWS["packed"]} for name, row in OTHER_ROWS.items())])
def test_packed(causal, rows, monkeypatch):
  """Rows that the layout holds, and one that it does not, which takes the whole call to the plain form."""
  calls = cudnn_stand_in.compute_packed(monkeypatch)
  check(list(rows.values()), Visibility(causal), "cudnn_packed")
  assert calls


@can_pack
def test_the_plain_form_is_for_what_the_layout_cannot_hold_only(monkeypatch):
  cudnn_stand_in.compute_packed(monkeypatch)
  monkeypatch.setattr(cudnn_packed.reference, "forward", lambda call, q, k, v, *_: (jnp.full_like(q, 7), None))
  q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in drawn(1))
  for name, row in (ROWS | OTHER_ROWS).items():
    segments = jnp.asarray([row])
    out = flash_attention(q, k, v, segment_ids=(segments, segments), backend="cudnn_packed", target="h100")
    assert bool((out == 7).all()) == (name in OTHER_ROWS), name


@can_pack
def test_packed_keeps_statistics_and_result_only(monkeypatch):
  """And no float of the plain form that stands beside it."""
  cudnn_stand_in.allow_lowering(monkeypatch)
  T = 1024
  sizes = kept("cudnn_packed", T)
  room = cudnn_packed.most_segments(T)
  assert sorted(sizes)[-1] <= max(room * N * T, N * T * 64)
  assert sum(size for size in sizes) < 3 * sum(kept("cudnn", T, segmented=False)) + room * N * T


@pytest.mark.parametrize("backend, name", [("cudnn", "ScaleBiasSoftmax"), ("cudnn_packed", "Softmax")])
def test_lowers_with_its_gradient(backend, name, monkeypatch):
  if backend == "cudnn_packed" and jax.__version_info__ < (0, 11, 2):
    pytest.skip("needs jax 0.11.2")
  cudnn_stand_in.allow_lowering(monkeypatch)
  q, k = (jax.ShapeDtypeStruct((2, 256, heads, 128), jnp.bfloat16) for heads in (8, 2))
  segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)
  loss = lambda q, k, v, s: flash_attention(q, k, v, segment_ids=(s, s), backend=backend, target="h100").sum()  # noqa: E731
  text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, segments).lower(lowering_platforms=("cuda",)).as_text()
  for call in (f"@__cudnn$fmha{name}(", f"@__cudnn$fmha{name}Backward("):
    assert text.count(call) == 1
  assert ("PADDING_CAUSAL" in text) == (backend == "cudnn_packed")


@can_pack
@pytest.mark.parametrize(
  "arguments, message",
  [
    (dict(segment_ids=None), "only for segments"),
    (dict(visibility=Visibility(window=4)), "no window"),
    (dict(return_lse=True), "no lse"),
  ],
)
def test_what_the_packed_layout_refuses(arguments, message):
  x, s = jnp.zeros((1, 32, N, H), jnp.bfloat16), jnp.ones((1, 32), jnp.int32)
  with pytest.raises(ConfigError, match=message):
    flash_attention(x, x, x, backend="cudnn_packed", target="h100", **(dict(segment_ids=(s, s)) | arguments))

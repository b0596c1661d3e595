"""CPU training kernels against float64 references: forward and gradients, float32 and bfloat16."""

import ctypes
import functools
import platform
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels import Visibility, cpu_ffi, elementwise, flash_attention
from jaxllm.kernels import head_loss as ce_lib
from jaxllm.kernels import matmul as matmul_lib

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def close(got, want, dtype):
  want, got = np.asarray(want, np.float64), np.asarray(got, np.float64)
  assert got.shape == want.shape and np.isfinite(got).all()
  assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(np.abs(want).max(), 1e-6)


def check(f, reference, args, dtype):
  """f and its gradients (random cotangent) against `reference` in float64 on the same, already rounded, inputs."""
  got, pull = jax.vjp(jax.jit(f), *args)
  ct = jnp.asarray(np.random.default_rng(7).standard_normal(got.shape), got.dtype)
  grads = jax.jit(pull)(ct)
  with jax.enable_x64(True):
    want, pull64 = jax.vjp(reference, *(jnp.asarray(np.asarray(a, np.float64)) for a in args))
    want_grads = pull64(jnp.asarray(np.asarray(ct, np.float64)))
  for a, b in zip((got, *grads), (want, *want_grads), strict=True):
    close(a, b, dtype)


def normal(seed, *shape, dtype=jnp.float32, scale=1.0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, dtype)


def test_every_kernel_that_is_called_is_registered():
  """Told by the sources, so that a machine without AVX-512 sees it too."""
  python = Path(cpu_ffi.__file__).parent.rglob("*.py")
  called = {name for path in python for name in re.findall(r'\(\s*"(cpu_[a-z_]+)"', path.read_text())}
  assert called == set(cpu_ffi.targets())


@pytest.fixture(params=["native", "fallback"])
def build(request, monkeypatch):
  """Both with the C++ kernels and as on a machine without a compiler."""
  if request.param == "native":
    if not cpu_ffi.available():
      pytest.skip(str(cpu_ffi.why_unavailable()))
  else:
    monkeypatch.setattr(cpu_ffi, "available", lambda: False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7, 33, 5), (2, 50, 96, 130), (3, 129, 64, 384)])
def test_matmul(build, shape, dtype):
  B, T, I, O = shape
  x, w = normal(0, B, T, I, dtype=dtype), normal(1, I, O, dtype=dtype)
  check(lambda x, w: matmul_lib.matmul(x, w, backend="cpu"), lambda x, w: x @ w, (x, w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows,I,O", [(1, 33, 5), (2, 64, 130), (5, 700, 96), (8, 300, 17), (9, 65, 40), (16, 96, 130)])
def test_matmul_of_a_few_rows(build, rows, I, O, transposed, dtype):
  x, w = normal(0, 1, rows, I, dtype=dtype), normal(1, *((O, I) if transposed else (I, O)), dtype=dtype)
  run = lambda x, w: matmul_lib.matmul(x, w, backend="cpu", transposed=transposed)  # noqa: E731
  check(run, lambda x, w: x @ (w.T if transposed else w), (x, w), dtype)
  if dtype == jnp.bfloat16:  # master weights are rounded as they are read
    wide = normal(1, *w.shape)
    np.testing.assert_array_equal(run(x, wide), run(x, wide.astype(dtype)))


def test_matmul_master_weights(build):
  x, w = normal(0, 4, 33, 64, dtype=jnp.bfloat16), normal(1, 64, 96)
  y, pull = jax.vjp(lambda x, w: matmul_lib.matmul(x, w, backend="cpu"), x, w)
  dx, dw = pull(y)
  assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,I,O,r", [(20, 33, 5, 3), (40, 33, 5, 3), (129, 96, 130, 16), (33, 700, 64, 40)])
def test_low_rank_matmul(build, rows, I, O, r, dtype):
  """Rows too few for the C++ product too."""
  x, w = normal(0, 1, rows, I, dtype=dtype), normal(1, I, O, dtype=dtype, scale=I**-0.5)
  a, b = normal(2, I, r, dtype=dtype, scale=I**-0.5), normal(3, r, O, dtype=dtype, scale=r**-0.5)
  run = lambda *arrays: matmul_lib.low_rank_matmul(*arrays, backend="cpu")  # noqa: E731
  check(run, lambda x, w, a, b: x @ w + (x @ a) @ b, (x, w, a, b), dtype)


def test_low_rank_matmul_is_one_product_each_way(build):
  """With a frozen w: its gradient is not computed, and no sum of two results is."""
  x, w, a, b = normal(0, 64, 48), normal(1, 48, 80), normal(2, 48, 8), normal(3, 8, 80)

  def loss(x, a, b):
    return (matmul_lib.low_rank_matmul(x, w, a, b, backend="cpu") ** 2).sum()

  text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, a, b).compile().as_text()
  if cpu_ffi.available():
    assert text.count('custom_call_target="cpu_matmul_plus"') == 2
    assert text.count('custom_call_target="cpu_matmul"') == 4  # x a, dy bᵀ, and the gradients of a and b
  assert not re.search(r"f32\[48,80\]\S* (custom-call|dot)", text)


def test_memory_that_is_freed_stays_within_a_bound():
  """A process that keeps freed memory has it back beyond a bound, and not below it."""
  code = """
    import numpy as np
    from pathlib import Path
    from jaxllm.kernels import cpu_ffi
    held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20
    assert cpu_ffi.keep_memory_resident()
    arrays = [np.ones(1 << 24, np.uint8) for _ in range(24)]
    pinned = arrays[::8]
    before = held()
    del arrays
    cpu_ffi.release_memory(beyond=8 << 30)
    kept = held()
    cpu_ffi.release_memory(beyond=0)
    print(before - kept, before - held())
  """
  if platform.system() != "Linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
    pytest.skip("glibc from 2.33 on")
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
  kept, given = map(int, done.stdout.split())
  assert kept < 64 and given > 200  # MiB, of 336 that were freed


def reference_attention(q, k, v, causal, window, seg, scale):
  g = q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, g, 2), jnp.repeat(v, g, 2)
  z = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
  i, j = np.arange(q.shape[1])[:, None], np.arange(k.shape[1])[None]
  m = np.ones((q.shape[0], 1, len(i), j.shape[1]), bool)
  m &= (j <= i) if causal else True
  if window:
    m &= (j > i - window) & (causal or (j < i + window))
  if seg is not None:
    a, b = (np.asarray(s) for s in seg)
    m &= ((a[:, :, None] == b[:, None]) & (a[:, :, None] != 0))[:, None]
  p = jnp.where(m, jax.nn.softmax(jnp.where(m, z, -1e30), -1), 0.0)
  return jnp.einsum("bnts,bsnh->btnh", p, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
  "case",
  [  # B, T, S, N, K, H, causal, window, segments
    (2, 64, 64, 2, 2, 64, True, None, False),
    (1, 100, 100, 4, 2, 64, True, None, True),
    (1, 70, 130, 4, 1, 40, False, None, False),
    (2, 150, 150, 2, 2, 32, True, 37, True),
    (1, 90, 90, 2, 1, 64, False, 20, True),
    (1, 5, 5, 1, 1, 16, True, None, False),
  ],
)
def test_attention(build, case, dtype):
  B, T, S, N, K, H, causal, window, segments = case
  args = [normal(i, *s, dtype=dtype) for i, s in enumerate([(B, T, N, H), (B, S, K, H), (B, S, K, H)])]
  seg = None
  if segments:
    s = np.sort(np.random.default_rng(3).integers(1, 4, (B, T)), -1)
    s[:, -7:] = 0
    seg = (jnp.asarray(s), jnp.asarray(s))
  check(
    lambda *a: flash_attention(*a, visibility=Visibility(causal, window), segment_ids=seg, backend="cpu"),
    lambda *a: reference_attention(*a, causal, window, seg, H**-0.5),
    args,
    dtype,
  )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed,z_loss,softcap", [(False, 0.0, None), (True, 1e-3, None), (True, 1e-3, 8.0)])
@pytest.mark.parametrize("backend", ["xla", "cpu"])
def test_cross_entropy(dtype, transposed, z_loss, softcap, backend):
  B, T, D, V = 2, 300, 40, 515
  x, head = normal(0, B, T, D, dtype=dtype), normal(1, *((V, D) if transposed else (D, V)), scale=0.3)
  rng = np.random.default_rng(2)
  targets, weights = rng.integers(0, V, (B, T)), rng.integers(0, 3, (B, T)).astype(np.float32)

  def reference(x, head):
    z = x @ (head.T if transposed else head)
    z = softcap * jnp.tanh(z / softcap) if softcap else z
    lse = jax.nn.logsumexp(z, -1)
    at = jnp.take_along_axis(z, jnp.asarray(targets)[..., None], -1)[..., 0]
    return ((lse - at + z_loss * lse * lse) * weights).sum()

  def f(x, h):
    return ce_lib.cross_entropy(
      x,
      h,
      jnp.asarray(targets),
      jnp.asarray(weights),
      z_loss=z_loss,
      softcap=softcap,
      transposed=transposed,
      backend=backend,
      chunk=64,
    )

  check(lambda x, h: f(x, h).loss_sum, reference, (x, head), dtype)
  sums = f(x, head)
  assert sums.weight_sum == weights.sum() and 0 <= sums.correct_sum <= sums.weight_sum
  assert (sums.z_loss_sum > 0) == (z_loss > 0)
  np.testing.assert_allclose(
    sums.loss_sum, reference(x.astype(jnp.float32), head), rtol=1e-5 if dtype == jnp.float32 else 1e-2
  )


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(build, dtype):
  x, w = normal(0, 3, 37, 72, dtype=dtype), normal(1, 72) + 1.0
  check(
    lambda x, w: elementwise.rms_norm(x, w, eps=1e-6, backend="cpu"),
    lambda x, w: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w,
    (x, w),
    dtype,
  )
  up = normal(4, 3, 37, 72, dtype=dtype)
  check(lambda x, up: elementwise.swiglu(x, up, backend="cpu"), lambda x, up: jax.nn.silu(x) * up, (x, up), dtype)
  q, angle = normal(2, 2, 19, 3, 40, dtype=dtype), np.random.default_rng(3).uniform(0, 6, (2, 19, 20))
  c, s = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

  def rotate(q):
    a, b = q[..., :20], q[..., 20:]
    return jnp.concatenate([a * c[:, :, None] - b * s[:, :, None], b * c[:, :, None] + a * s[:, :, None]], -1)

  forms = elementwise._rope_by_halves, elementwise._rope_by_roll, elementwise._rope_by_product  # CPU, GPU, TPU
  for rope in (functools.partial(elementwise.rope, backend="cpu"), *forms):
    check(lambda q, rope=rope: rope(q, jnp.asarray(c), jnp.asarray(s)), rotate, (q,), dtype)


def test_cross_entropy_memory_does_not_grow_with_the_vocabulary_times_tokens():
  def temporaries(vocab):
    x, head = jax.ShapeDtypeStruct((1, 8192, 16), jnp.float32), jax.ShapeDtypeStruct((16, vocab), jnp.float32)
    t, w = jax.ShapeDtypeStruct((1, 8192), jnp.int32), jax.ShapeDtypeStruct((1, 8192), jnp.float32)
    f = jax.grad(lambda x, h, t, w: ce_lib.cross_entropy(x, h, t, w, chunk=256).loss_sum, argnums=(0, 1))
    return jax.jit(f).lower(x, head, t, w).compile().memory_analysis().temp_size_in_bytes

  logits = 4 * 8192 * 4096
  assert temporaries(4096) < logits / 4

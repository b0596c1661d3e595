"""Backends "cpu_invariant": a row's result among any number of rows is, to the bit, that of the row alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import (
  KVPages,
  Visibility,
  cpu_ffi,
  elementwise,
  flash_attention,
  paged_attention,
  quantize,
  quantized_matmul,
  write_pages,
)
from jaxllm.kernels import head_loss as head_loss_lib
from jaxllm.kernels.matmul import matmul

COUNTS = (1, 2, 3, 5, 8, 9, 16, 33, 64)
MODE = {"backend": "cpu_invariant"}
DTYPES = ["float32", "bfloat16"]

pytestmark = pytest.mark.skipif(not cpu_ffi.available(), reason=str(cpu_ffi.why_unavailable()))


def normal(seed, *shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def check_rows(f, x, want, tolerance, counts=COUNTS):
  """f of some rows of x is f of all of them, of which each is near `want`; so is each row's place without effect."""
  f = jax.jit(f)
  every = np.asarray(f(x), np.float32)
  assert np.abs(every - want).max() <= tolerance * np.abs(want).max()
  for count in counts:
    np.testing.assert_array_equal(np.asarray(f(x[:count]), np.float32), every[:count])
    np.testing.assert_array_equal(np.asarray(f(x[-count:]), np.float32), every[-count:])


def exact(x):
  return np.asarray(x, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("I, O", [(331, 150), (960, 33)])
def test_product(I, O, transposed, dtype):
  x, w = normal(0, 130, I, dtype=dtype), normal(1, I, O, dtype=dtype)
  lies = w.T if transposed else w
  tolerance = 1e-5 if dtype == "float32" else 1e-2
  check_rows(lambda x: matmul(x, lies, transposed=transposed, **MODE), x, exact(x) @ exact(w), tolerance)


def test_product_of_master_weights_and_its_float32_result():
  """Float32 weights beside 16-bit rows are what they are when they are rounded before; the head's are not rounded."""
  x, w = normal(0, 70, 200, dtype="bfloat16"), normal(1, 200, 96)
  for count in COUNTS:
    got, rounded = (matmul(x[:count], v, dtype=jnp.float32, **MODE) for v in (w, w.astype("bfloat16")))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, rounded)
  want = exact(x[:count]) @ exact(w.astype("bfloat16"))
  assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_product_of_other_types_is_an_error():
  with pytest.raises(ConfigError, match="float32 and bfloat16 in C"):
    matmul(jnp.ones((2, 3), jnp.float16), jnp.ones((3, 4), jnp.float16), **MODE)


@pytest.mark.parametrize(
  "format, group, dtype", [("int8", None, "bfloat16"), ("int8", 128, "float32"), ("int4", 32, "float32")]
)
def test_quantized_product(format, group, dtype):
  x, w = normal(0, 70, 384, dtype=dtype), quantize(normal(1, 384, 150), format, group)
  want = exact(x) @ exact(quantized_matmul(jnp.eye(384), w, backend="xla"))
  check_rows(lambda x: quantized_matmul(x, w, target="cpu", **MODE), x, want, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [50, 576])
def test_norms(dim, dtype):
  x, w, b = normal(0, 70, dim, dtype=dtype), 1 + normal(1, dim) / 5, normal(2, dim)
  y = exact(x)
  centred = y - y.mean(-1, keepdims=True)
  scaled = lambda y: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-5)  # noqa: E731
  tolerance = 1e-5 if dtype == "float32" else 1e-2
  check_rows(lambda x: elementwise.rms_norm(x, w, eps=1e-5, **MODE), x, scaled(y) * exact(w), tolerance)
  layer_norm = scaled(centred) * exact(w) + exact(b)
  check_rows(lambda x: elementwise.layer_norm(x, w, b, eps=1e-5, **MODE), x, layer_norm, tolerance)


def test_gradient_of_layer_norm():
  arrays = normal(0, 3, 40), 1 + normal(1, 40) / 5, normal(2, 40)
  got, want = (
    jax.grad(lambda *a, b=b: jnp.sin(elementwise.layer_norm(*a, eps=1e-5, backend=b)).sum(), (0, 1, 2))(*arrays)
    for b in ("cpu_invariant", "xla")
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_log_softmax_is_the_head_loss_token_by_token():
  x, head = normal(0, 70, 330) / 3, normal(1, 330, 203)
  ids = jnp.arange(70) * 2

  def apart(x):
    return elementwise.log_softmax(matmul(x, head, **MODE), **MODE)

  logits = exact(x) @ exact(head)
  want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  check_rows(apart, x, want, 1e-5)
  for count in COUNTS:
    got = head_loss_lib.token_log_probs(x[None, :count], head, ids[None, :count], target="cpu", **MODE)[0]
    np.testing.assert_array_equal(got[0], apart(x)[jnp.arange(count), ids[:count]])


# ---------------------------------------------------------------- attention

OPTIONS = {
  "plain": {},
  "window": dict(window=70),
  "options": dict(softcap=3.0, alibi_slopes=np.float32([0.5, 0.25, 0.1, 0.02, 0.3, 0.01])),
}


def attend(q, k, v, window=None, **options):
  return flash_attention(q, k, v, visibility=Visibility(True, window), target="cpu", **MODE, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_is_that_of_pages_read_in_any_parts(name, dtype):
  """In one row, in the middle of packed documents, padded, as a cache's last tokens, and in pages part by part."""
  T, N, K, H = 330, 6, 2, 32
  q, k, v = (normal(i, 1, T, heads, H, dtype=dtype) for i, heads in enumerate((N, K, K)))
  every = attend(q, k, v, **OPTIONS[name])
  plain = OPTIONS[name] | {"visibility": Visibility(True, OPTIONS[name].get("window")), "backend": "xla"}
  plain.pop("window", None)
  want = flash_attention(*(x.astype(jnp.float32) for x in (q, k, v)), **plain)
  assert np.abs(exact(every) - exact(want)).max() < (2e-6 if dtype == "float32" else 2e-2)

  before, after = 37, 15
  around = lambda x: jnp.concatenate([x[:, :before], x, x[:, :after]], 1)  # noqa: E731
  ids = np.repeat(np.int32([[3, 1, 0]]), [before, T, after], axis=1)
  packed = attend(around(q), around(k), around(v), segment_ids=(jnp.asarray(ids), jnp.asarray(ids)), **OPTIONS[name])
  np.testing.assert_array_equal(exact(packed[:, before:-after]), exact(every))
  for count in (1, 2, 17, 64):
    last = attend(q[:, -count:], k, v, query_offset=jnp.int32([T - count]), **OPTIONS[name])
    np.testing.assert_array_equal(exact(last), exact(every[:, -count:]))

  table = jnp.asarray(np.random.default_rng(3).permutation(40)[:21][None], jnp.int32)
  pages = KVPages.zeros(40, 16, K, H, dtype)
  pages = write_pages(pages, k[0], v[0], table, jnp.int32([T]), jnp.int32([0, T]))
  for at, count in ((0, 300), (290, 40), (329, 1), (250, 7)):
    starts = None if count == 1 else jnp.int32([0, count])
    got = paged_attention(
      q[0, at : at + count], pages, table, jnp.int32([at + count]), starts, target="cpu", **MODE, **OPTIONS[name]
    )
    np.testing.assert_array_equal(exact(got), exact(every[0, at : at + count]))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_of_attention(name):
  q, k, v, d = (normal(i, 2, 45, heads, 16) for i, heads in enumerate((6, 2, 2, 6)))
  ids = jnp.asarray(np.repeat(np.int32([[1, 2, 0], [4, 4, 5]]), [20, 21, 4], axis=1))
  options = dict(OPTIONS[name])
  v_options = {"visibility": Visibility(True, options.pop("window", None)), "segment_ids": (ids, ids)}

  def loss(backend):
    return lambda *a: (flash_attention(*a, target="cpu", backend=backend, **v_options, **options) * d).sum()

  got, want = (jax.grad(loss(backend), (0, 1, 2))(q, k, v) for backend in ("cpu_invariant", "xla"))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_segment_in_two_places_is_an_error():
  q, k, v = (normal(i, 1, 6, 2, 16) for i in range(3))
  ids = jnp.int32([[1, 2, 2, 1, 1, 0]])
  with pytest.raises(Exception, match="the tokens of a segment must stand together"):
    jax.block_until_ready(attend(q, k, v, segment_ids=(ids, ids)))


@pytest.mark.parametrize("asked", [dict(sinks=jnp.zeros(2)), dict(bias=jnp.zeros((1, 2, 6, 6)))], ids=str)
def test_options_that_it_has_not(asked):
  q, k, v = (normal(i, 1, 6, 2, 16) for i in range(3))
  with pytest.raises(ConfigError, match=f"cannot compute this call: no {next(iter(asked))}"):
    attend(q, k, v, **asked)

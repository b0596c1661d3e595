"""Quantized products: rounding, layout, the plain form and the CPU kernel against float64, what is refused."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import QuantizedWeight, cpu_ffi, dequantize, quantize, quantized_matmul
from jaxllm.kernels.quantized.weights import FORMATS, from_codes, pack, unpack

TOLERANCE = {"float32": 2e-6, "bfloat16": 1.2e-2}  # of the largest result; bfloat16 rounds weights and results


def normal(seed, *shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def weight(format, D=192, F=70, group_size=None, asymmetric=False, seed=0, **options) -> QuantizedWeight:
  return quantize(normal(seed, D, F) * 0.1 + 0.03, format, group_size, asymmetric=asymmetric, **options)


def close(got, want, dtype):
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape and np.isfinite(got).all()
  assert np.abs(got - want).max() <= TOLERANCE[dtype] * np.abs(want).max()


def test_packing_order():
  codes = np.random.default_rng(0).integers(0, 16, (3, 512)).astype(np.uint8)
  packed = np.asarray(pack(jnp.asarray(codes)))
  assert packed[2, 5] == codes[2, 5] | codes[2, 133] << 4
  assert packed[1, 128 + 7] == codes[1, 256 + 7] | codes[1, 256 + 128 + 7] << 4
  np.testing.assert_array_equal(unpack(jnp.asarray(packed)), codes)


@pytest.mark.parametrize("format", FORMATS)
def test_stacked_layers_and_dense_form(format):
  stacked = quantize(normal(0, 2, 192, 70), format, None)
  assert stacked.shape == (2, 192, 70) and dequantize(stacked).shape == stacked.shape
  one = jax.tree.map(lambda a: a[1], stacked)
  np.testing.assert_allclose(dequantize(one), oracle.dense(one), rtol=1e-6, atol=1e-9)
  np.testing.assert_array_equal(dequantize(stacked)[1], dequantize(one))


@pytest.mark.parametrize("format,group,asymmetric", [("int8", 64, False), ("int4", 32, False), ("int4", 32, True)])
def test_rounds_to_the_nearest_code(format, group, asymmetric):
  w = np.asarray(normal(1, 128, 40))
  q = quantize(jnp.asarray(w), format, group, asymmetric=asymmetric)
  step = np.repeat(np.asarray(q.scales, np.float64)[: 128 // group], group, 0)
  error = np.abs(oracle.dense(q) - w)
  # Half a step; the ends of a symmetric range are clipped, by half a step more at most, and an asymmetric zero point
  # is rounded, so that the range may shift by half a step.
  assert (error <= 1.001 * step * (1 if asymmetric or format == "int4" else 0.5)).all()
  assert (error <= 0.501 * step).mean() > 0.97


def test_nf4_takes_the_nearest_value():
  w = np.asarray(normal(2, 64, 8))
  q = quantize(jnp.asarray(w), "nf4", 64)
  scale = np.abs(w).max(0)
  nearest = np.abs(w[..., None] / scale[:, None] - oracle.NF4).min(-1)
  np.testing.assert_allclose(np.abs(w - oracle.dense(q)) / scale, nearest, atol=1e-6)


@settings(max_examples=8, deadline=None)
@given(
  format=st.sampled_from(FORMATS),
  M=st.sampled_from([1, 3, 17]),
  D=st.sampled_from([64, 128, 192, 320]),
  F=st.integers(1, 70),
  group=st.sampled_from([None, 16, 32, 64]),
  asymmetric=st.booleans(),
  dtype=st.sampled_from(["float32", "bfloat16"]),
  scale_dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_reference(format, M, D, F, group, asymmetric, dtype, scale_dtype):
  group = None if format.endswith("_dynamic") else group
  q = weight(format, D, F, group, asymmetric and format == "int4", scale_dtype=scale_dtype)
  x, dy = normal(1, 2, M, D, dtype=dtype), normal(2, 2, M, F, dtype=dtype)
  y, pull = jax.vjp(lambda x: quantized_matmul(x, q), x)
  close(y, oracle.product(x, q), dtype)
  close(pull(dy)[0], oracle.gradient(dy, q), dtype)


def test_weights_get_no_gradient():
  q, x = weight("int4", group_size=64, asymmetric=True), normal(1, 4, 192)
  d = jax.grad(lambda x, q: quantized_matmul(x, q).sum(), argnums=1, allow_int=True)(x, q)
  assert d.values.dtype == jax.dtypes.float0 and not d.scales.any() and not d.zeros.any()


@pytest.fixture
def native():
  if not cpu_ffi.available():
    pytest.skip(str(cpu_ffi.why_unavailable()))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("M", [1, 3, 4, 8, 11, 16, 33, 130])
@pytest.mark.parametrize(
  "format,D,group,asymmetric",
  [("int8", 192, None, False), ("int8", 320, 64, False), ("int4", 192, 32, False), ("int4", 512, 128, True)]
  + [("int4", 64, 16, True), ("int4", 192, None, True), ("nf4", 320, 64, False)],
)
def test_cpu_kernel(native, format, D, group, asymmetric, M, dtype):
  q, x = weight(format, D, 70, group, asymmetric), normal(1, M, D, dtype=dtype)
  f = jax.jit(lambda x, q: quantized_matmul(x, q, backend="auto", target="cpu"))
  y = f(x, q)
  close(y, oracle.product(x, q), dtype)
  np.testing.assert_array_equal(np.asarray(y), np.asarray(f(x, q)))


def test_refusals():
  x, q = normal(0, 2, 192), weight("int8")
  with pytest.raises(ConfigError, match="unknown format"):
    quantize(normal(0, 64, 8), "int3")
  with pytest.raises(ConfigError, match="do not divide"):
    quantize(normal(0, 64, 8), "int4", 48)
  with pytest.raises(ConfigError, match="scale for each output feature"):
    quantize(normal(0, 64, 8), "int8_dynamic", 32)
  with pytest.raises(ConfigError, match="zero points"):
    quantize(normal(0, 64, 8), "nf4", 32, asymmetric=True)
  with pytest.raises(ConfigError, match=r"x \[\.\.\., D\]"):
    quantized_matmul(normal(0, 2, 64), q)
  with pytest.raises(ConfigError, match="no backend"):
    quantized_matmul(x, q, backend="mosaic_gpu", target="a100")
  with pytest.raises(ConfigError, match="bfloat16 activations only|needs jax"):
    quantized_matmul(x, q, backend="mosaic_gpu", target="h100")
  with pytest.raises(ConfigError, match="groups of 32|needs jax"):
    quantized_matmul(x.astype("bfloat16"), weight("int4", group_size=16), backend="pallas_tpu", target="v5e")
  assert quantized_matmul(x[:0], q).shape == (0, 70)


qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="the oracle qwix is not installed")


@qwix
@pytest.mark.parametrize("format,qtype,group", [("int8", "int8", None), ("int4", "int4", 64), ("nf4", "nf4", 64)])
def test_same_rounding_as_qwix(format, qtype, group):
  from qwix._src.core import qarray

  w = normal(3, 256, 48)
  how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: group} if group else {})
  theirs = qarray.quantize(w, how)
  ours = quantize(w, format, group)
  np.testing.assert_allclose(dequantize(ours), qarray.dequantize(theirs), rtol=1e-6, atol=1e-7)
  codes = theirs.qvalue.astype(jnp.int32) + (8 if format == "int4" else 0)
  again = from_codes(codes, theirs.scale.reshape(-1, 48), None, format, group)
  np.testing.assert_array_equal(again.values, ours.values)

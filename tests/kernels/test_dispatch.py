"""A new backend is one module and one entry in the table: here it is written while the test runs, for two ops."""

import importlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends, dequantize, flash_attention, grouped_matmul, quantize, quantized_matmul

QUANTIZED = """
import jax.numpy as jnp
from jaxllm.kernels.quantized import dequantize

def refuses(call, x, weight):
  return None if weight.format == "int8" else f"int8 only, not {weight.format}"

def forward(call, x, weight):
  return (3 * x @ dequantize(weight)).astype(call.options.dtype)  # three times too large: to be known by

def backward(call, dy, weight):
  return (5 * dy @ dequantize(weight).T).astype(call.options.dtype)
"""
ATTENTION = """
import jax.numpy as jnp

def refuses(call, query, key, value, options):
  return "no soft cap" if "softcap" in options.asked else None

def quadratic(call, query, key, value, options):
  return "its scores" if query.shape[1] > 8 else None

def forward(call, query, key, value, options):  # differentiated by jax
  return 7 * query, None
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
  for package, text in (("quantized", QUANTIZED), ("attention", ATTENTION)):
    (tmp_path / package).mkdir()
    (tmp_path / package / f"{package}_toy.py").write_text(text)
    module = importlib.import_module(f"jaxllm.kernels.{package}")
    monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path / package)])
    op = "quantized_matmul" if package == "quantized" else package
    monkeypatch.setitem(backends.BACKENDS, op, {"cpu": (f"{package}_toy", "xla")})
  monkeypatch.setattr(backends, "_logged", {})
  monkeypatch.setattr(logging.getLogger("jaxllm"), "propagate", True)


@pytest.mark.parametrize("backend", ["quantized_toy", "auto"])
def test_quantized(toys, backend):
  rng = np.random.default_rng(0)
  x, dy = (jnp.asarray(rng.standard_normal((4, n)), jnp.float32) for n in (64, 8))
  q = quantize(jnp.asarray(rng.standard_normal((64, 8))), "int8")
  y, pull = jax.vjp(lambda x: quantized_matmul(x, q, backend=backend, target="cpu"), x)
  np.testing.assert_allclose(y, 3 * x @ dequantize(q), rtol=1e-5)
  np.testing.assert_allclose(pull(dy)[0], 5 * dy @ dequantize(q).T, rtol=1e-5)
  assert backends.chosen("quantized_matmul", "cpu") == {"quantized_toy": ""}


@pytest.mark.parametrize("backend", ["attention_toy", "auto"])
def test_attention(toys, backend):
  x = jnp.ones((1, 4, 2, 8))
  y, pull = jax.vjp(lambda x: flash_attention(x, x, x, backend=backend, target="cpu"), x)
  np.testing.assert_array_equal(y, 7 * x)
  np.testing.assert_array_equal(pull(x)[0], 7 * x)
  assert backends.chosen("attention", "cpu") == {"attention_toy": ""}


def test_refused_with_the_reason(toys):
  x, q = jnp.ones((4, 64)), quantize(jnp.ones((64, 8)), "nf4")
  with pytest.raises(ConfigError, match="'quantized_toy' cannot compute this call: int8 only, not nf4"):
    quantized_matmul(x, q, backend="quantized_toy", target="cpu")
  quantized_matmul(x, q, backend="auto", target="cpu")
  assert backends.chosen("quantized_matmul", "cpu") == {"xla": "quantized_toy: int8 only, not nf4"}
  x = jnp.ones((1, 4, 2, 8))
  with pytest.raises(ConfigError, match="'attention_toy' cannot compute this call: no soft cap"):
    flash_attention(x, x, x, softcap=1.0, backend="attention_toy", target="cpu")
  flash_attention(x, x, x, softcap=1.0, backend="auto", target="cpu")
  assert backends.chosen("attention", "cpu") == {"xla": "attention_toy: no soft cap"}


def test_passed_over_for_what_it_holds(toys):
  x = jnp.ones((1, 16, 2, 8))
  flash_attention(x, x, x, backend="auto", target="cpu")
  assert backends.chosen("attention", "cpu") == {"xla": "attention_toy: its scores"}


def test_no_second_derivative_where_the_op_says_so():
  x, w, sizes = jnp.ones((8, 4)), jnp.ones((2, 4, 3)), jnp.asarray([5, 3])
  inner = jax.grad(lambda x: (grouped_matmul(x, w, sizes) ** 2).sum())
  with pytest.raises(ConfigError, match="no second derivative"):
    jax.grad(lambda x: inner(x).sum())(x)

"""Rounding of weights that are kept layer by layer, and of a table that is the head as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels import QuantizedWeight
from jaxllm.models.config import Compute
from jaxllm.models.quantization import quantize_matrix, quantize_table
from jaxllm.models.weights import PerLayer, dense, project_transposed, rows


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def test_each_layer_of_a_stack_is_rounded():
  layers = PerLayer((normal(0, 64, 32), normal(1, 64, 32)))
  found = quantize_matrix("blocks/mlp/up/weight", layers, "int8")
  assert all(isinstance(w, QuantizedWeight) for w in found.layers)
  step = np.abs(np.asarray(layers.dense())).max(1, keepdims=True) / 127.5
  assert (np.abs(np.asarray(found.dense()) - np.asarray(layers.dense())) <= 0.51 * step).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_table_in_int8_is_looked_up_in_and_multiplied_by(dtype, count):
  plain = normal(2, 50, 36)
  table = quantize_table(plain)
  whole = np.asarray(dense(table), np.float64)
  step = np.abs(np.asarray(plain)).max(1, keepdims=True) / 127.5
  assert table.shape == (50, 36) and (np.abs(whole - np.asarray(plain)) <= 0.51 * step).all()
  ids = jnp.asarray([[0, 49, 7], [50, -1, 3]])
  found = np.asarray(rows(table, ids, jnp.float32))
  np.testing.assert_allclose(found[0], whole[[0, 49, 7]], rtol=1e-6)
  assert np.isnan(found[1, :2]).all() and not np.isnan(found[1, 2]).any()
  x = normal(3, count, 36).astype(dtype)
  want = np.asarray(x, np.float64) @ whole.T
  close = 1e-5 if dtype == "float32" else 0.05
  got = project_transposed(x, table, Compute(dtype=dtype))
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=close, atol=close)

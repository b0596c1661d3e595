"""16-bit floats as integers of 15 bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels.integers import split, split_scale


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_split(dtype):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((6, 300)) * np.array([1e-4, 1, 1, 300, 1, 0])[:, None]
  x[1, 7], x[2, 3] = 1000, 255 / 128  # one far larger than the others, and one that just fits
  x = jnp.asarray(x, dtype)
  (upper, lower), largest = split(x)
  assert upper.dtype == lower.dtype == jnp.int8
  x, whole = np.asarray(x, np.float64), 256 * np.asarray(upper, np.float64) + np.asarray(lower, np.float64)
  error = np.abs(whole * np.asarray(split_scale(largest), np.float64)[:, None] - x)
  bound = np.abs(x).max(1, keepdims=True)
  np.testing.assert_array_equal(largest, bound[:, 0])
  assert (error <= 2.0**-14 * bound).all()
  if dtype == jnp.bfloat16:
    assert not error[np.abs(x) >= bound / 64].any()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad):
  _, largest = split(jnp.asarray([[1.0, bad]], jnp.bfloat16))
  assert not np.isfinite(split_scale(largest)).any()

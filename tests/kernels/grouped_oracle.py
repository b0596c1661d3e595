"""Grouped products by their definition, in float64, and cases to compare with."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels import grouped_matmul, tuning


def oracle(x, weights, sizes, dy):
  """(y, dx, dweights) of numpy arrays: each group's rows times its matrix, nothing past the last group."""
  x, weights, dy = (np.asarray(a, np.float64) for a in (x, weights, dy))
  y, dx, dweights = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(weights.shape)
  start = 0
  for group, size in enumerate(sizes):
    rows = slice(start, min(start + int(size), len(x)))
    y[rows] = x[rows] @ weights[group]
    dx[rows] = dy[rows] @ weights[group].T
    dweights[group] = x[rows].T @ dy[rows]
    start = rows.stop
  return y, dx, dweights


def case(sizes, M, D, F, dtype=jnp.float32, seed=0):
  """Random (x, weights, sizes, dy); rows of x and dy that belong to no group are NaN."""
  keys = jax.random.split(jax.random.key(seed), 3)
  sizes = np.asarray(sizes, np.int32)
  past = (np.arange(M) >= sizes.sum())[:, None]
  x, dy = (jnp.where(past, jnp.nan, jax.random.normal(key, (M, n), dtype)) for key, n in zip(keys, (D, F)))
  return x, jax.random.normal(keys[2], (len(sizes), D, F), dtype) * D**-0.5, jnp.asarray(sizes), dy


def run(x, weights, sizes, dy, tiles=None, **options):
  """(y, dx, dweights) of `grouped_matmul`; tiles: the fields to set of the backend's."""

  def both(x, weights, sizes, dy):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **options), x, weights)
    return y, *pull(dy)

  with contextlib.ExitStack() as stack:
    for op in ("grouped_matmul", "grouped_gradient", "grouped_matmul_xla") if tiles else ():
      stack.enter_context(tuning.trying(op, tiles))
    return jax.jit(both)(x, weights, sizes, dy)


def check(arrays, run=run, **options):
  """`run` against the oracle, within what rounding the result to its dtype allows; its results."""
  got = run(*arrays, **options)
  dtype = arrays[0].dtype
  # Sums are float32: results are off by their own rounding, and by the sums' of as many terms as rows or columns.
  step = float(jnp.finfo(dtype).eps)
  for name, a, b in zip(("y", "dx", "dweights"), got, oracle(*arrays), strict=True):
    assert a.dtype == dtype, name
    scale = max(1.0, np.abs(b).max())
    np.testing.assert_allclose(
      np.float64(a), b, rtol=step, atol=scale * max(2e-6, 0.1 * step * (dtype != jnp.float32)), err_msg=name
    )
  return got


def sizes_of(split, groups, rng=np.random.default_rng(0)):
  """`split` rows over `groups` groups, at random."""
  return np.bincount(rng.integers(0, groups, split), minlength=groups)


same = functools.partial(jax.tree.map, np.testing.assert_array_equal)

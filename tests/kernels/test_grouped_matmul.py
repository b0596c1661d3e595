"""`grouped_matmul` in plain XLA against float64, and what every backend promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_oracle import case, check, run, same, sizes_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends, grouped_matmul
from jaxllm.kernels.grouped import reference

RAGGED = ([3, 0, 20, 7], [0, 0, 0, 30], [30, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("sizes", RAGGED, ids=str)
def test_oracle(sizes, dtype):
  """Forward and gradients; the 11 or more rows that are no group's hold NaN."""
  _, dx, dweights = check(case(sizes, 41, 24, 16, dtype))
  assert not np.asarray(dx[sum(sizes) :], np.float32).any()
  assert not np.asarray(dweights, np.float32)[np.asarray(sizes) == 0].any()


compiled = jax.jit(run)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.one_of(st.just(0), st.integers(0, 70)), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_any_sizes(sizes, seed):
  """With rows left over, and with sizes past the rows."""
  check(case(sizes, 150, 8, 12, seed=seed), compiled)


@pytest.mark.parametrize("tile", [1, 7, 16, 64])
def test_tiles_do_not_matter(tile):
  check(case([3, 0, 41, 7], 60, 8, 12), tiles=dict(rows=tile))


def test_sizes_past_the_rows_are_cut_off():
  x, w, _, dy = case([10, 10], 20, 8, 4)
  sizes = jnp.array([15, 90])
  check((x, w, sizes, dy))


def test_a_groups_nan_stays_in_the_group():
  """Neighbours share tiles of rows, and nothing else."""
  x, w, sizes, dy = case([5, 6, 5], 16, 8, 4)
  y, dx, dweights = run(x.at[6].set(jnp.nan), w, sizes, dy)
  clean = run(x, w, sizes, dy)
  assert np.isnan(y[6]).all() and np.isnan(dweights[1]).all()
  same((y[:6], y[7:], dx, dweights[0], dweights[2]), (clean[0][:6], clean[0][7:], clean[1], clean[2][0], clean[2][2]))


def test_deterministic():
  arrays = case(sizes_of(200, 8), 210, 16, 24, jnp.bfloat16)
  same(run(*arrays), run(*arrays))


def test_memory_does_not_grow_with_the_experts():
  """XLA's own ragged_dot copies the rows for each of them on CPUs."""

  def temporaries(E, multiply):
    M, D, F = 4096, 128, 256
    shapes = ((M, D), (E, D, F), (M, F))
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

    def both(x, w, sizes, dy):
      y, pull = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
      return y, *pull(dy)

    compiled = jax.jit(both).lower(x, w, jax.ShapeDtypeStruct((E,), jnp.int32), dy).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  few, many = temporaries(4, grouped_matmul), temporaries(64, grouped_matmul)
  rows = 4096 * (128 + 256) * 4
  assert many < few + rows / 4 and many < 2 * rows
  assert temporaries(64, jax.lax.ragged_dot) > 16 * rows  # or there is no need for this form any more


def test_inside_shard_map():
  """Rows and sizes differ from device to device, the matrices do not: their gradient is the devices' sum."""
  mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
  parts = [case(sizes, 12, 8, 4, seed=seed) for seed, sizes in enumerate(([3, 0, 5], [2, 6, 1]))]
  x, _, sizes, dy = (jnp.concatenate(arrays) for arrays in zip(*parts))
  w = parts[0][1]

  def loss(x, w):
    split = jax.shard_map(grouped_matmul, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
    return jax.vjp(lambda x, w: split(x, w, sizes), x, w)

  y, pull = loss(x, w)
  dx, dweights = pull(dy)
  alone = [run(a, w, s, d) for a, _, s, d in parts]
  np.testing.assert_allclose(y, jnp.concatenate([one[0] for one in alone]), atol=1e-6)
  np.testing.assert_allclose(dx, jnp.concatenate([one[1] for one in alone]), atol=1e-6)
  np.testing.assert_allclose(dweights, sum(one[2] for one in alone), atol=1e-5)


def test_nothing_to_multiply():
  empty = jnp.zeros((0, 8))
  assert grouped_matmul(empty, jnp.ones((2, 8, 4)), jnp.zeros(2, jnp.int32)).shape == (0, 4)
  y = grouped_matmul(jnp.ones((3, 8)), jnp.ones((0, 8, 4)), jnp.zeros(0, jnp.int32))
  assert y.shape == (3, 4) and not y.any()


@pytest.mark.parametrize("platform, target, word", [("tpu", "v5p", "ragged_dot"), ("cuda", "h100", "while")])
def test_xla_lowers_for_accelerators(platform, target, word):
  x, w, sizes, dy = case([8, 8], 16, 8, 4)
  traced = jax.jit(lambda *a: run(*a, backend="xla", target=target)).trace(x, w, sizes, dy)
  assert word in traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_native_form_computes_the_same():
  """The form for TPUs, run here."""
  x, w, sizes, dy = case([3, 0, 20, 7], 41, 24, 16)
  for a, b in zip(run(x, w, sizes, dy, target="v5p", backend="xla"), run(x, w, sizes, dy), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert reference._native("v5p") and not reference._native(None)


@pytest.mark.parametrize(
  "x, w, sizes, options, message",
  [
    ((4, 8), (2, 9, 4), (2,), {}, r"takes x \[M, D\], weights \[E, D, F\]"),
    ((4, 8), (2, 8, 4), (3,), {}, r"group_sizes \[E\]"),
    ((4, 8), (2, 8, 4), (2,), dict(backend="cudnn"), r"no backend 'cudnn'"),
    ((4, 8), (2, 8, 4), (2,), dict(backend="auto"), r"needs target="),
    ((4, 8), (2, 8, 4), (2,), dict(backend="pallas_tpu", target="h100"), r"no backend 'pallas_tpu' on h100"),
  ],
)
def test_impossible_calls(x, w, sizes, options, message):
  with pytest.raises(ConfigError, match=message):
    grouped_matmul(jnp.ones(x), jnp.ones(w), jnp.ones(sizes, jnp.int32), **options)


@pytest.mark.parametrize("backend", ["xla", "pallas_tpu"])
def test_no_second_derivative(backend):
  if backend == "pallas_tpu" and jax.__version_info__ < (0, 11):
    pytest.skip("needs jax 0.11")
  x, w, sizes, _ = case([3, 2], 6, 8, 4)
  gradient = jax.grad(lambda w: (grouped_matmul(x, w, sizes, backend=backend) ** 2).sum())
  with pytest.raises(ConfigError, match="no second derivative"):
    jax.eval_shape(jax.grad(lambda w: gradient(w).sum()), w)


def test_auto():
  assert backends.choose("grouped_matmul", "auto", "cpu") == "xla"
  check(case([3, 2], 6, 8, 4), backend="auto", target="cpu")

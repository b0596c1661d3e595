"""A quantized weight on a mesh: one device's product and gradient, and only codes travel."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.kernels import dequantize, quantize
from jaxllm.kernels import quantized_matmul as plain
from jaxllm.kernels.quantized import part_axes, rows
from jaxllm.kernels.quantized.weights import splits
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.kernels import Shards, quantized_matmul, quantized_specs
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import activation_sharding

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import hlo

RULES = AxisRules()
B, T, D, F = 4, 2, 1024, 64
UP, DOWN = ("embed", "mlp"), ("mlp", "embed")
MESHES = [dict(data=1, fsdp=2, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(data=1, tensor=2), dict(data=2, fsdp=4)]
FORMATS = [
  ("int8", None, False),
  ("int8", 64, False),
  ("int4", 32, True),
  ("int4", 128, False),
  ("int4", None, True),
  ("nf4", 64, False),
  ("int8_dynamic", None, False),
]


def normal(seed, *shape, dtype="float32"):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def both(x, q, dy, multiply):
  y, pull = jax.vjp(lambda x: multiply(x, q), x)
  return y, pull(dy)[0]


def on_mesh(sizes, axes, x, q, dy, rules=RULES, **options):
  """(y, dx) with the weight where a mesh keeps it, and the collectives of the compiled program."""
  mesh = make_mesh(MeshConfig(**sizes))
  specs = quantized_specs(Shards(mesh, rules), q, axes)
  shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

  def run(x, q, dy):
    with activation_sharding(mesh, rules):
      return both(x, q, dy, lambda x, q: quantized_matmul(x, q, axes, **options))

  compiled = jax.jit(run, in_shardings=(None, shardings, None)).lower(x, q, dy).compile()
  return compiled(x, jax.device_put(q, shardings), dy), hlo.collectives(compiled.as_text(), mesh)


def close(got, want, tolerance=3e-6):
  for a, b in zip(got, want, strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("axes", [UP, DOWN], ids=["up", "down"])
@pytest.mark.parametrize(  # every mesh with two formats, every format on one mesh
  "sizes, format", [(s, f) for s in MESHES for f in FORMATS if s == MESHES[1] or f in FORMATS[1:3]], ids=str
)
def test_one_devices_numbers_and_no_dense_weight_travels(sizes, format, axes):
  q = quantize(normal(0, D, F), *format[:2], asymmetric=format[2])
  x, dy = normal(1, B, T, D), normal(2, B, T, F)
  got, found = on_mesh(sizes, axes, x, q, dy)
  close(got, both(x, q, dy, plain))
  stored = sum(part.nbytes for part in jax.tree.leaves(q))
  fsdp, tensor = sizes.get("fsdp", 1), sizes.get("tensor", 1)
  gathers = [one for one in found if one.kind == "all-gather"]
  # Forward and backward gather codes, scales and zero points over fsdp; a dense weight would be 4 bytes a number.
  from_fsdp = sum(one.bytes for one in gathers if "fsdp" in one.axes)
  assert from_fsdp <= 2 * stored and (from_fsdp > 0) == (fsdp > 1)
  assert {one.kind for one in found} <= {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
  if tensor > 1 and not q.dynamic:  # sums over tensor, of which one direction has some
    assert any(one.kind == "all-reduce" and one.axes == ("tensor",) for one in found)


def test_partial_sums_of_16_bits_are_added_up_in_float32():
  """Their exact sum, rounded once: equal to one device's but for the order of sums in float32."""
  q = quantize(normal(0, D, F), "int4", 64)
  x, dy = normal(1, B, T, D, dtype="bfloat16"), normal(2, B, T, F, dtype="bfloat16")
  (y, dx), found = on_mesh(dict(data=1, tensor=2), DOWN, x, q, dy)
  (want, want_dx) = both(x, q, dy, plain)
  assert (np.asarray(y) == np.asarray(want)).mean() > 0.98 and y.dtype == dx.dtype == jnp.bfloat16
  (up, d_up), _ = on_mesh(dict(data=1, tensor=2), UP, x, q, dy)
  assert (np.asarray(d_up) == np.asarray(want_dx)).mean() > 0.98
  np.testing.assert_array_equal(np.asarray(up), np.asarray(want))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_table_as_the_head(dynamic):
  """x W^T, a weight [V, D] split over both axes."""
  q = quantize(normal(0, 512, 32), "int8_dynamic" if dynamic else "nf4", None if dynamic else 64)
  x, dy = normal(1, B, T, 32), normal(2, B, T, 512)
  got, found = on_mesh(dict(data=2, fsdp=2, tensor=2), ("vocab", "embed"), x, q, dy, transposed=True)
  close(got, both(x, q, dy, lambda x, q: plain(x, q, transposed=True)))
  dense = dequantize(q)
  close(got, (x @ dense.T, dy @ dense))


@pytest.mark.parametrize("x", [(3, 2), (5,), (), (4, 2, 3)], ids=str)
def test_any_batch(x):
  q = quantize(normal(0, D, F), "int4", 64)
  x, dy = normal(1, *x, D), normal(2, *x, F)
  close(on_mesh(dict(data=2, fsdp=2, tensor=2), UP, x, q, dy)[0], both(x, q, dy, plain))


def test_a_weight_that_cannot_be_split_is_whole():
  """384 inputs are one block and a half."""
  q = quantize(normal(0, 384, F), "int4", 64)
  specs = quantized_specs(Shards(make_mesh(MeshConfig(data=1, fsdp=2, tensor=4)), RULES), q, UP)
  assert (specs.values, specs.scales) == (PartitionSpec("tensor", None), PartitionSpec(None, "tensor"))
  x, dy = normal(1, B, T, 384), normal(2, B, T, F)
  close(on_mesh(dict(data=1, fsdp=2, tensor=4), DOWN, x, q, dy)[0], both(x, q, dy, plain))


@pytest.mark.parametrize(
  "format, group, size, ways, can",
  [
    ("int8", None, 512, 4, True),
    ("int8", None, 512, 8, False),  # blocks of 128
    ("int4", None, 512, 2, True),
    ("int4", 64, 512, 4, False),  # blocks of 256
    ("int8", 256, 512, 4, False),  # groups of 256
    ("nf4", 64, 640, 2, False),  # padded
    ("nf4", 64, 640, 1, False),
  ],
)
def test_where_codes_can_be_split(format, group, size, ways, can):
  q = jax.eval_shape(lambda: quantize(jnp.zeros((size, 8)), format, group))
  assert splits(q, ways) == can


def test_axes_of_the_parts():
  q = jax.eval_shape(lambda: quantize(jnp.zeros((3, 512, 8)), "int4", 64, asymmetric=True))
  turned, groups = ("layers", "mlp", "embed"), ("layers", "embed", "mlp")
  assert part_axes(q, groups) == {"values": turned, "scales": groups, "zeros": groups}
  q = jax.eval_shape(lambda: quantize(jnp.zeros((512, 8)), "int8"))
  assert part_axes(q, UP) == {"values": ("mlp", "embed"), "scales": (None, "mlp")}
  assert part_axes(q, UP, lambda axis: 16) == {"values": (None, None), "scales": (None, None)}


@pytest.mark.parametrize("format, group, asymmetric", [*FORMATS[:6], ("fp8", 32, False)], ids=str)
def test_rows_of_a_table(format, group, asymmetric):
  group = 100 if group == 128 else group  # over the border of a block
  q = quantize(normal(0, 700, 24), format, group if group in (None, 100) else 70, asymmetric=asymmetric)
  ids = jnp.asarray(np.random.default_rng(0).integers(0, 700, (3, 50)))
  got = jax.jit(rows)(q, ids)
  np.testing.assert_array_equal(got, np.asarray(dequantize(q))[np.asarray(ids)])
  assert np.isnan(np.asarray(rows(q, jnp.asarray([-1, 700])))).all()
  assert rows(q, ids, jnp.bfloat16).dtype == jnp.bfloat16

"""Paged attention on a mesh: one device's numbers, and pages that stay where they are."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.kernels import KVPages
from jaxllm.kernels import paged_attention as plain
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.kernels import paged_attention
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import activation_sharding

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import hlo

RULES = AxisRules()


def call(K, dtype="float32", target=None, H=64):
  """(query, pages, tables, options): two sequences of 20 and 9 tokens, of which 3 and 1 are new."""
  rng = np.random.default_rng(0)
  pages = KVPages.zeros(8, 16, K, H, dtype, target=target)
  draw = lambda x: jnp.asarray(rng.standard_normal(x.shape) * 20, x.dtype) if x.ndim == 4 else jnp.full(x.shape, 0.05)  # noqa: E731
  tables = jnp.asarray([[3, 1], [6, 0]]), jnp.asarray([20, 9]), jnp.asarray([0, 3, 4])
  query = jnp.asarray(rng.standard_normal((4, 8, H)), jnp.float32)
  options = dict(sinks=jnp.arange(8.0), alibi_slopes=jnp.arange(8) / 8, return_lse=True, softcap=9.0)
  return query, jax.tree.map(draw, pages), tables, options


@pytest.mark.parametrize("dtype, target", [("float32", None), ("int8", None), ("float32", "v5e")])
@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(data=1, fsdp=2, tensor=4)], ids=str)
def test_one_devices_numbers(sizes, dtype, target):
  K = 4
  query, pages, tables, options = call(K, dtype, target)
  mesh = make_mesh(MeshConfig(**sizes))
  split = 1 if target == "v5e" and sizes["tensor"] == 4 else sizes["tensor"]  # two heads share a row there
  where = NamedSharding(mesh, PartitionSpec(None, "tensor" if split > 1 else None))

  def run(query, pages):
    with activation_sharding(mesh, RULES):
      return paged_attention(query, pages, *tables, backend="xla", **options)

  compiled = jax.jit(run, in_shardings=(None, where)).lower(query, pages).compile()
  for got, want in zip(compiled(query, jax.device_put(pages, where)), plain(query, pages, *tables, **options)):
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
  moved = [one for one in hlo.collectives(compiled.as_text(), mesh) if one.bytes > query.nbytes]
  assert not moved, moved


def test_key_heads_that_do_not_divide():
  query, pages, tables, options = call(2)
  mesh = make_mesh(MeshConfig(data=1, tensor=8))
  with activation_sharding(mesh, RULES):
    got = jax.jit(lambda q, p: paged_attention(q, p, *tables, backend="xla", **options))(query, pages)
  for a, b in zip(got, plain(query, pages, *tables, **options)):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)

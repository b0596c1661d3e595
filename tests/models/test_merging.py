"""Merged adapters compute what they did apart, and come apart again to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.kernels import quantize
from jaxllm.models.config import Compute
from jaxllm.models.lora import DoraWeight, LoraWeight, column_lengths
from jaxllm.models.merging import merge, unmerge
from jaxllm.models.weights import PerLayer, project, project_transposed, rows, without_adapters


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("form", ["plain", "nf4", "layers"])
def test_merge_and_unmerge(kind, form):
  keys = iter(jax.random.split(jax.random.key(0), 9))
  base = jax.random.normal(next(keys), (64, 24))
  under = quantize(base, "nf4", 64) if form == "nf4" else base
  parts = dict(a=jax.random.normal(next(keys), (64, 3)), b=jax.random.normal(next(keys), (3, 24)), scale=0.5)
  lora = (
    DoraWeight(under, **parts, magnitude=2 * column_lengths(under)) if kind == "dora" else LoraWeight(under, **parts)
  )
  tree = {"w": PerLayer((base, lora)) if form == "layers" else lora, "other": base}
  merged = merge(tree)
  one = merged["w"][1] if form == "layers" else merged["w"]
  x, y = jax.random.normal(next(keys), (5, 64)), jax.random.normal(next(keys), (5, 24))
  compute = Compute(dtype="float32")
  np.testing.assert_allclose(project(x, one, compute), project(x, lora, compute), atol=1e-4)
  np.testing.assert_allclose(project_transposed(y, one, compute), project_transposed(y, lora, compute), atol=1e-4)
  ids = jnp.asarray([[0, 63]])
  np.testing.assert_allclose(rows(one, ids, jnp.float32), rows(lora, ids, jnp.float32), atol=1e-4)
  back = unmerge(merged)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert all(a is b for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree)))
  bare = without_adapters(merged)["w"]  # which is what stood under the adapters, not what they made of it
  assert jax.tree.leaves(bare)[-1] is jax.tree.leaves(under)[-1]

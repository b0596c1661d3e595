"""Several adapters over one weight: each token's product is that with its own adapter's dense matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import dequantize, quantize
from jaxllm.models.config import Compute
from jaxllm.models.lora import DoraWeight, LoraWeight
from jaxllm.models.multi_lora import MultiLoraWeight, adapter_of, with_adapters, with_several
from jaxllm.models.weights import PerLayer, part_axes, project, project_transposed, rows, without_adapters

COMPUTE = Compute(matmul="xla")
INDEX = jnp.array([[0, 1, 2, 3, 4], [3, 3, 0, 2, 1]])
BASES = {
  "plain": lambda w: w,
  "int8": lambda w: quantize(w, "int8"),
  "nf4": lambda w: quantize(w, "nf4", 64),
}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) * shape[-2] ** -0.5


def adapters(base):
  """A plain one, one with a factor of its own, none at all, and one with magnitudes."""
  I, O = base.shape
  one = LoraWeight(base, normal(1, I, 2), normal(2, 2, O), scale=0.5)
  two = LoraWeight(LoraWeight(base, normal(3, I, 5), normal(4, 5, O), scale=2.0), normal(5, I, 1), normal(6, 1, O))
  magnitude = 1.5 + normal(9, 1, O)[0]
  four = DoraWeight(base, normal(7, I, 3), normal(8, 3, O), scale=0.7, magnitude=magnitude)
  return [one, two, None, four]


def exact(base, adapter):
  """The matrix by its definition, float64."""
  if adapter is None:
    return np.asarray(dequantize(base) if hasattr(base, "scales") else base, np.float64)
  under = adapter.base if isinstance(adapter.base, LoraWeight) else None
  total = exact(base, under) + adapter.scale * (np.asarray(adapter.a, np.float64) @ np.asarray(adapter.b, np.float64))
  if isinstance(adapter, DoraWeight):
    total *= np.asarray(adapter.magnitude, np.float64) / np.linalg.norm(total, axis=0)
  return total


def several(base, given):
  tree = with_several({"w": base}, [{} if one is None else adapter_of({"w": one}) for one in given])
  assert isinstance(tree["w"], MultiLoraWeight) and tree["w"].base is base
  return tree


@pytest.mark.parametrize("form", BASES)
def test_products(form):
  base = BASES[form](normal(0, 128, 48))
  given = adapters(base)
  matrices = [exact(base, one) for one in [None, *given]]
  w = with_adapters(several(base, given), INDEX)["w"]
  x, y = normal(11, 2, 5, 128), normal(12, 2, 5, 48)
  ids = jnp.array([[3, 127, 0, 3, 9], [7, 7, 7, 7, 8]])
  got = project(x, w, COMPUTE), project_transposed(y, w, COMPUTE), rows(w, ids, jnp.float32)
  for place in np.ndindex(2, 5):
    own = matrices[int(INDEX[place])]
    np.testing.assert_allclose(got[0][place], x[place] @ own, atol=2e-5)
    np.testing.assert_allclose(got[1][place], y[place] @ own.T, atol=2e-5)
    np.testing.assert_allclose(got[2][place], own[int(ids[place])], atol=2e-5)


def test_a_token_under_none_has_what_the_base_gives_to_the_bit():
  base = normal(0, 128, 48)
  tree = several(base, adapters(base))
  x, ids = normal(11, 2, 5, 128), jnp.array([[3, 127]])
  for w in (tree["w"], with_adapters(tree, jnp.zeros((1, 1), int))["w"]):
    np.testing.assert_array_equal(project(x, w, COMPUTE), project(x, base, COMPUTE))
    np.testing.assert_array_equal(rows(w, ids, jnp.float32), base[ids])
  assert without_adapters(tree)["w"] is base


def test_each_layer_has_those_that_change_it():
  base = PerLayer((normal(0, 16, 8), normal(1, 16, 8)))
  stacked = LoraWeight(None, normal(2, 2, 16, 3), normal(3, 2, 3, 8), scales=jnp.array([1.0, 2.0]), scale=0.5)
  second = PerLayer((None, LoraWeight(None, normal(4, 16, 1), normal(5, 1, 8))))
  tree = with_adapters(with_several({"w": base}, [{"w": stacked}, {"w": second}]), jnp.array([[1, 2]]))
  x = normal(6, 1, 2, 16)
  for i, layer in enumerate(tree["w"].layers):
    y = project(x, layer, COMPUTE)[0]
    one = base[i] + 0.5 * (1, 2)[i] * stacked.a[i] @ stacked.b[i]
    other = base[i] + (second[1].a @ second[1].b if i else 0)
    np.testing.assert_allclose(y, [x[0, 0] @ one, x[0, 1] @ other], atol=1e-5)
  assert [len(layer.owner) for layer in tree["w"].layers] == [3, 4]
  assert with_several({"v": base}, [{}, {}])["v"] is base


def test_what_overflows_under_one_adapter_stays_there():
  base = normal(0, 16, 8)
  wild, tame = (LoraWeight(base, a, normal(2, 2, 8)) for a in (normal(1, 16, 2) * 1e38, normal(3, 16, 2)))
  w = with_adapters(several(base, [wild, tame]), jnp.array([[1, 2]]))["w"]
  y = project(100 * normal(4, 1, 2, 16), w, COMPUTE)[0]
  assert not np.isfinite(y[0]).all() and np.isfinite(y[1]).all()


def test_axes_are_named_and_nothing_is_trained():
  base = quantize(normal(0, 128, 48), "int8")
  w = several(base, adapters(base))["w"]
  axes = part_axes(w, ("embed", "mlp"), lambda axis: 1)
  assert (axes.a, axes.b, axes.owner, axes.factors) == (("embed", None), (None, "mlp"), (None,), (None, "mlp"))
  assert axes.base.values == ("mlp", "embed")
  assert not any(jax.tree.leaves(w.trained()))


def test_what_does_not_fit_is_named():
  base = normal(0, 16, 8)
  fits = LoraWeight(None, normal(1, 16, 2), normal(2, 2, 8))
  dora = DoraWeight(fits, fits.a, fits.b, magnitude=jnp.ones(8))
  for params, adapter, message in (
    ({"w": base}, {"v": fits}, "the model has no v"),
    ({"w": base.T}, {"w": fits}, r"w is \[8, 16\] here and \[16, 8\] in the adapter"),
    ({"w": base[None]}, {"w": fits}, "w is of experts, whose tokens are sorted"),
    ({"w": base}, {"w": dora}, "w has a DoRA adapter beside another one"),
  ):
    with pytest.raises(ConfigError, match=message):
      with_several(params, [adapter])


def test_an_adapter_alone_holds_no_base():
  base = normal(0, 16, 8)
  lora = LoraWeight(base, normal(1, 16, 2), normal(2, 2, 8))
  found = adapter_of({"x": {"w": PerLayer((base, dataclasses.replace(lora, base=lora)))}, "y": base})
  assert list(found) == ["x/w"]
  assert sorted(x.shape for x in jax.tree.leaves(found)) == [(2, 8), (2, 8), (16, 2), (16, 2)]

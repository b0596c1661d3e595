"""Activations against transformers': values and gradients, under each of its names; and in plain and gated blocks."""

import functools

import jax
import numpy as np
import oracle
import pytest
from flax import nnx

torch = pytest.importorskip("torch")
activations = pytest.importorskip("transformers.activations")

from jaxllm.base.errors import ConfigError  # noqa: E402
from jaxllm.interop.families.table import activation_name, mlp_name  # noqa: E402
from jaxllm.models.config import ACTIVATIONS, MLPS, ModelConfig  # noqa: E402
from jaxllm.models.mlp import ACTIVATIONS as FUNCTIONS  # noqa: E402
from jaxllm.models.mlp import MLP  # noqa: E402

# Two have parameters of their own; the last is a router's, whose gradient is infinite far below 0.
NOT_READ = {"prelu", "xielu", "sqrtsoftplus"}


X = np.concatenate([np.linspace(-30.01, 30, 1000), [1e-3, -1e4, 1e4]]).astype(np.float32)  # no corner of any


@functools.cache
def ours(name):
  """(values, gradients, the gradient at 0) of one of our activations."""
  gradient = jax.vmap(jax.value_and_grad(FUNCTIONS[name]))
  values, gradients = gradient(np.append(X, np.float32(0)))
  return values[:-1], gradients[:-1], gradients[-1]


@pytest.mark.parametrize("name", sorted(activations.ACT2CLS.keys() - NOT_READ))
def test_values_and_gradients(name):
  values, gradients, at_zero = ours(mlp_name(name, gated=False))
  theirs = torch.tensor(X, requires_grad=True)
  want = activations.ACT2FN[name](theirs)
  want.sum().backward()
  np.testing.assert_allclose(values, want.detach().numpy(), rtol=1e-6, atol=2e-6)
  np.testing.assert_allclose(gradients, theirs.grad.numpy(), rtol=0, atol=5e-6)
  assert np.isfinite(at_zero)


@pytest.mark.parametrize("name", sorted(NOT_READ | {"gelu_tanh"}))
def test_names_that_are_refused(name):
  with pytest.raises(ConfigError, match=f"has the activation '{name}'; those known are "):
    mlp_name(name, gated=True)


def test_blocks():
  """Plain and gated, under the name that config.json would have."""
  x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
  for name in ("mish", "gated_mish", "geglu", "gated_relu2", "linear"):
    gated = MLPS[name][1]
    with nnx.use_eager_sharding(False):
      mlp = MLP(ModelConfig(embed_dim=8, num_heads=2, mlp_dim=12, mlp=name), oracle.XLA, rngs=nnx.Rngs(0))
    gate, up, down = (torch.tensor(np.asarray(m.weight[...])) for m in (mlp.gate or mlp.up, mlp.up, mlp.down))
    theirs = torch.tensor(x)
    hidden = activations.ACT2FN[activation_name(name)](theirs @ gate) * (theirs @ up if gated else 1)
    oracle.assert_close(mlp(x), (hidden @ down).numpy())


def test_each_activation_is_plain_and_gated_under_one_name():
  assert sorted(MLPS.values()) == sorted(
    [(name, gated) for name in ACTIVATIONS for gated in (False, True)] + [("silu_clamped", True)]
  )
  for name in MLPS.keys() - {"swiglu_clamped"}:
    assert mlp_name(activation_name(name), gated=MLPS[name][1]) == name
  assert MLPS["mish"] == ("mish", False) and MLPS["gated_mish"] == ("mish", True) and MLPS["swiglu"] == ("silu", True)
  for field in ("mlp", "head_dense"):
    with pytest.raises(ConfigError, match=f"model.{field} is 'softsign'; choose one of"):
      ModelConfig(**{field: "softsign"})
  with pytest.raises(ConfigError, match="can say model.mlp = 'swiglu_clamped'"):
    activation_name("swiglu_clamped")

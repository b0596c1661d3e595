"""Every algorithm against torch.optim (layer by layer) or its formula in float64; rules; shardings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from toy_model import toy_params

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import quantize
from jaxllm.models.lora import LoraWeight
from jaxllm.training.adafactor import statistic_spec
from jaxllm.training.config import OptimizerConfig, ParamRule
from jaxllm.training.muon import scale_by_muon
from jaxllm.training.optimizer import make_optimizer, state_shardings
from jaxllm.training.param_rules import plan_params

STEPS = 8
BASE = OptimizerConfig(learning_rate=0.02, schedule="constant", warmup_steps=0, weight_decay=0.1)


def gradients(params, step):
  rng = np.random.default_rng(100 + step)
  draw = lambda p: rng.normal(size=p.shape) * 10.0 ** rng.integers(-3, 2)  # noqa: E731
  return jax.tree.map(lambda p: jnp.asarray(draw(p), jnp.float32), params)


def run(config, params, steps=STEPS):
  optimizer = make_optimizer(config, steps, params)
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(steps):
    updates, state = update(gradients(params, step), state, params, step=step)
    params = optax.apply_updates(params, updates)
  return params


def leaves(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def flat(params):
  return {path: np.asarray(leaf, np.float64) for path, leaf in leaves(params).items()}


# Written out by hand: an independent statement of the default rule.
DECAYS = {
  "embedding/tokens": False,
  "blocks/mlp/up": True,
  "blocks/mlp/down": True,
  "blocks/mlp_norm/scale": False,
  "blocks/mlp_norm/bias": False,
  "head/kernel": True,
  "encoder/blocks/mlp/up": True,
}
MATRICES = ("blocks/mlp/up", "blocks/mlp/down", "encoder/blocks/mlp/up")


def uneven_params():
  """Stacks of three layers and one of two, as encoder-decoders and mixtures with dense layers have them."""
  up = toy_params(seed=1)["blocks"]["mlp"]["up"][:2]
  return toy_params() | {"encoder": {"blocks": {"mlp": {"up": up}}}}


def stacked(path):
  return "blocks" in path.split("/")


def slices(path, array):
  """The tensors that a framework without stacked layers would hold."""
  return list(array) if stacked(path) else [array]


def reference(params, make, steps=STEPS):
  """Runs `make(path, initial) -> (grad -> new value)`, one instance per layer of each parameter."""
  initial = flat(params)
  runners = {path: [make(path, x) for x in slices(path, array)] for path, array in initial.items()}
  result = initial
  for step in range(steps):
    grads = flat(gradients(params, step))
    for path, layers in runners.items():
      new = [layer(g) for layer, g in zip(layers, slices(path, grads[path]), strict=True)]
      result[path] = np.stack(new) if stacked(path) else new[0]
  return result


def assert_same(actual, expected, **tolerance):
  actual = flat(actual)
  assert actual.keys() == expected.keys()
  for path, value in expected.items():
    np.testing.assert_allclose(actual[path], value, err_msg=path, **tolerance)


def torch_runner(build):
  torch = pytest.importorskip("torch")

  def make(path, initial):
    weight = torch.tensor(initial, dtype=torch.float64, requires_grad=True)
    optimizer = build(torch, path, weight)

    def step(grad):
      weight.grad = torch.tensor(grad)
      optimizer.step()
      return weight.detach().numpy().copy()

    return step

  return make


def test_adamw_is_torchs():
  def build(torch, path, weight):
    return torch.optim.AdamW([weight], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1 if DECAYS[path] else 0.0)

  params = uneven_params()
  expected = reference(params, torch_runner(build))
  assert_same(run(BASE, params), expected, rtol=2e-5, atol=2e-6)


def test_sgd_without_decay_is_torchs():
  def build(torch, path, weight):
    return torch.optim.SGD([weight], lr=0.02, momentum=0.9)

  params = uneven_params()
  expected = reference(params, torch_runner(build))
  config = dataclasses.replace(BASE, name="sgd", weight_decay=0.0)
  assert_same(run(config, params), expected, rtol=2e-5, atol=2e-5)


def test_sgd_decay_is_decoupled():
  params = {"w": jnp.full((2, 2), 3.0)}
  config = dataclasses.replace(BASE, name="sgd", b1=0.0)
  optimizer = make_optimizer(config, 1, params)
  updates, _ = optimizer.update({"w": jnp.full((2, 2), 5.0)}, optimizer.init(params), params, step=0)
  np.testing.assert_allclose(updates["w"], -0.02 * (5 + 0.1 * 3), rtol=1e-6)


def test_adafactor_is_torchs_in_every_layer():
  def build(torch, path, weight):
    # torch caps the rate at 1/sqrt(step), which is higher than ours here.
    return torch.optim.Adafactor([weight], lr=0.02, weight_decay=0.1 if DECAYS[path] else 0.0)

  params = uneven_params()
  expected = reference(params, torch_runner(build))
  assert_same(run(dataclasses.replace(BASE, name="adafactor"), params), expected, rtol=1e-4, atol=1e-5)


def test_lion_is_its_formula():
  def make(path, initial):
    weight, mu = initial, np.zeros_like(initial)

    def step(grad):
      nonlocal weight, mu
      direction = np.sign(0.9 * mu + 0.1 * grad)
      weight = weight - 0.02 * (direction + (0.1 if DECAYS[path] else 0) * weight)
      mu = 0.95 * mu + 0.05 * grad
      return weight

    return step

  params = uneven_params()
  config = dataclasses.replace(BASE, name="lion")
  assert_same(run(config, params), reference(params, make), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_each_expert_is_a_matrix_of_its_own(name):
  """Stacked along layers and experts, beside a matrix stacked along layers: as every expert alone."""
  rng = np.random.default_rng(0)
  router, experts = rng.normal(size=(2, 8, 3)), rng.normal(size=(2, 3, 8, 6))  # [L, D, E], [L, E, D, F]

  def update(params, grads):
    params, grads = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (params, grads))
    optimizer = make_optimizer(dataclasses.replace(BASE, name=name), 1, params)
    return optimizer.update(grads, optimizer.init(params), params, step=0)[0]

  def tree(x, y):
    return {"blocks": {"moe": {"router": {"weight": x}, "up": {"weight": y}}}}

  got = update(tree(router, experts), tree(router**2, experts**2))["blocks"]["moe"]
  for layer in range(2):
    for expert in range(3):
      alone = experts[layer : layer + 1, expert]
      want = update({"blocks": {"mlp": {"up": alone}}}, {"blocks": {"mlp": {"up": alone**2}}})["blocks"]["mlp"]["up"]
      np.testing.assert_allclose(got["up"]["weight"][layer, expert], want[0], rtol=1e-4, atol=1e-6)
    alone = router[layer : layer + 1]
    want = update({"blocks": {"mlp": {"up": alone}}}, {"blocks": {"mlp": {"up": alone**2}}})["blocks"]["mlp"]["up"]
    np.testing.assert_allclose(got["router"]["weight"][layer], want[0], rtol=1e-4, atol=1e-6)


def newton_schulz(x):
  a, b, c = 3.4445, -4.7750, 2.0315
  x = x / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = a * x + b * gram @ x + c * gram @ gram @ x
  return x


def test_muon_is_its_formula_in_every_layer_and_adamw_elsewhere():
  def make(path, initial):
    weight, mu, nu, count = initial, np.zeros_like(initial), np.zeros_like(initial), 0
    decay = 0.1 if DECAYS[path] else 0

    def step(grad):
      nonlocal weight, mu, nu, count
      count += 1
      if path in MATRICES:
        mu = 0.95 * mu + 0.05 * grad
        fan_in, fan_out = weight.shape
        # Nesterov's momentum with the bias corrections of optax (Dozat 2016).
        ahead = 0.95 * mu / (1 - 0.95 ** (count + 1)) + 0.05 * grad / (1 - 0.95**count)
        direction = newton_schulz(ahead) * max(1, fan_out / fan_in) ** 0.5
        weight = weight - 0.05 * (direction + decay * weight)
      else:
        mu, nu = 0.9 * mu + 0.1 * grad, 0.95 * nu + 0.05 * grad**2
        direction = mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.95**count)) + 1e-8)
        weight = weight - 0.02 * (direction + decay * weight)
      return weight

    return step

  params = uneven_params()
  config = dataclasses.replace(BASE, name="muon", muon_learning_rate=0.05)
  assert_same(run(config, params), reference(params, make), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("shape", [(8, 24), (3, 24, 8), (1, 8, 8), (2, 3, 8, 24)])
def test_muon_is_optaxs(shape):
  axes = optax.contrib.MuonDimensionNumbers(len(shape) - 2, len(shape) - 1)
  oracle = optax.contrib.scale_by_muon(weight_dimension_numbers={"w": axes})
  ours = scale_by_muon(0.95)
  params = {"w": jnp.zeros(shape)}
  state, wanted_state = ours.init(params), oracle.init(params)
  for step in range(3):
    updates, state = ours.update(gradients(params, step), state)
    wanted, wanted_state = oracle.update(gradients(params, step), wanted_state)
    factor = max(1, shape[-1] / shape[-2]) ** 0.5
    np.testing.assert_allclose(updates["w"], factor * wanted["w"], rtol=1e-4, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state, wanted_state)


def test_muon_leaves_a_matrix_without_gradient():
  updates, _ = scale_by_muon(0.95).update(zeros := {"w": jnp.zeros((2, 4, 4))}, scale_by_muon(0.95).init(zeros))
  assert not updates["w"].any()


def test_muon_is_torchs():
  torch = pytest.importorskip("torch")
  params = {"blocks": {"up": toy_params()["blocks"]["mlp"]["up"]}}
  weights = [torch.tensor(np.asarray(w).T.copy(), requires_grad=True) for w in params["blocks"]["up"]]
  oracle = torch.optim.Muon(weights, lr=0.05, weight_decay=0.1)
  for step in range(STEPS):
    for weight, grad in zip(weights, np.asarray(gradients(params, step)["blocks"]["up"])):
      weight.grad = torch.tensor(grad.T.copy())  # torch's [out, in]
    oracle.step()
  config = dataclasses.replace(BASE, name="muon", muon_learning_rate=0.05)
  expected = np.stack([w.detach().numpy().T for w in weights])
  # torch iterates in bfloat16.
  np.testing.assert_allclose(run(config, params)["blocks"]["up"], expected, atol=0.02)


def test_default_decay_and_algorithms():
  plans = plan_params(dataclasses.replace(BASE, name="muon"), uneven_params())
  assert {plan.path: plan.weight_decay > 0 for plan in plans} == DECAYS
  assert [plan.path for plan in plans if plan.algorithm == "muon"] == sorted(MATRICES)
  assert {plan.algorithm for plan in plans} == {"muon", "adamw"}


@pytest.mark.parametrize("path, shape, decays, stack_axes", [
  ("blocks/attention/query", (4, 8, 8), True, 1),
  ("blocks/attention/query_norm/scale", (4, 8), False, 1),
  ("blocks/attention/sinks", (4, 8), False, 1),
  ("blocks/moe/up", (4, 2, 8, 16), True, 2),
  ("blocks/moe/up_bias", (4, 2, 16), False, 1),
  ("blocks/moe/up/weight/magnitude", (4, 2, 16), False, 1),
  ("encoder/blocks/mlp/up", (4, 8, 16), True, 1),
  ("embedding/positions", (32, 8), False, 0),
  ("head/bias", (32,), False, 0),
])  # fmt: skip
def test_plans_go_by_name_not_by_rank(path, shape, decays, stack_axes):
  tree = jax.ShapeDtypeStruct(shape, jnp.float32)
  for part in reversed(path.split("/")):
    tree = {part: tree}
  (plan,) = plan_params(BASE, tree)
  assert (plan.weight_decay > 0, plan.stack_axes) == (decays, stack_axes)


def test_rules_first_match_wins_and_keeps_the_default_decay():
  rules = (
    ParamRule("mlp/up$", lr_scale=0.5, weight_decay=0.3),
    ParamRule("^blocks/mlp", lr_scale=2.0),
    ParamRule("embedding", weight_decay=0.2),
  )
  plans = plan_params(dataclasses.replace(BASE, rules=rules), toy_params())
  plans = {plan.path: (plan.lr_scale, plan.weight_decay) for plan in plans}
  assert plans["blocks/mlp/up"] == (0.5, 0.3)
  assert plans["blocks/mlp/down"] == (2.0, 0.1)
  assert plans["blocks/mlp_norm/bias"] == (2.0, 0.0)
  assert plans["embedding/tokens"] == (1.0, 0.2)
  assert plans["head/kernel"] == (1.0, 0.1)


@pytest.mark.parametrize("rules, message", [
  ((ParamRule("blocks/mlq"),), "blocks/mlq"),
  ((ParamRule(".*"), ParamRule("head")), "'head'"),
  ((ParamRule("mlp("),), "not a regular expression"),
  ((ParamRule("head", lr_scale=-1.0),), "lr_scale"),
  ((ParamRule(".*", lr_scale=0.0),), "freeze every parameter"),
])  # fmt: skip
def test_mistaken_rules_are_named(rules, message):
  with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
    make_optimizer(dataclasses.replace(BASE, rules=rules), 10, toy_params())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_lr_scale_scales(name):
  params = toy_params()
  rules = (ParamRule("mlp/up$", lr_scale=0.25),)
  plain_config = dataclasses.replace(BASE, name=name)
  config = dataclasses.replace(plain_config, rules=rules)
  changes = {}
  for key, c in {"plain": plain_config, "ruled": config}.items():
    optimizer = make_optimizer(c, 10, params)
    state = optimizer.init(params)
    changes[key] = flat(optimizer.update(gradients(params, 0), state, params, step=0)[0])
  up, down = "blocks/mlp/up", "blocks/mlp/down"
  np.testing.assert_allclose(changes["ruled"][up], 0.25 * changes["plain"][up], rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(changes["ruled"][down], changes["plain"][down], rtol=1e-4, atol=1e-7)


def test_what_is_frozen():
  """Quantized weights whole, what stands under an adapter, and what a rule says."""
  weight = quantize(jnp.ones((2, 128, 4)), "int8")
  params = {"a": weight, "b": LoraWeight(weight, jnp.ones((2, 128, 1)), jnp.ones((2, 1, 4))), "c": jnp.ones((4, 4))}
  plans = plan_params(dataclasses.replace(BASE, rules=(ParamRule("^c", lr_scale=0.0),)), params)
  assert [plan.path for plan in plans if plan.algorithm != "frozen"] == ["b/a", "b/b"]
  assert len(plans) == 7


def test_step_places_the_rate_and_count_the_bias_correction():
  params = {"w": jnp.zeros((2, 2))}
  config = dataclasses.replace(BASE, schedule="linear", final_lr_fraction=0.0)
  optimizer = make_optimizer(config, 11, params)
  grads = {"w": jnp.ones((2, 2))}
  updates, state = optimizer.update(grads, optimizer.init(params), params, step=jnp.int32(5))
  # The first update of Adam is sign(grad) times the rate, whatever the step.
  np.testing.assert_allclose(updates["w"], -0.01, rtol=1e-5)
  assert all(int(count) == 1 for path, count in flat(state).items() if path.endswith("count"))


def shardings_of(params):
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def spec(path, leaf):
    sharded = path[0].key == "blocks" and leaf.ndim == 3
    return NamedSharding(mesh, P(None, "fsdp", "tensor") if sharded else P())

  return jax.tree_util.tree_map_with_path(spec, params)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_state_shardings_follow_the_parameters(name):
  params = toy_params()
  wanted = shardings_of(params)
  optimizer = make_optimizer(dataclasses.replace(BASE, name=name), 10, params)
  found = state_shardings(jax.eval_shape(optimizer.init, params), params, wanted)
  state = jax.jit(optimizer.init, out_shardings=found)(params)
  # Adafactor's rows and columns [L, D], [L, F] lie like the axis that is left of [L, D, F].
  specs = {
    "up": {(3, 16, 32): P(None, "fsdp", "tensor"), (3, 16): P(None, "fsdp"), (3, 32): P(None, "tensor"), (3, 1): P()},
    "down": {(3, 32, 16): P(None, "fsdp", "tensor"), (3, 32): P(None, "fsdp"), (3, 16): P(None, "tensor"), (3, 1): P()},
  }
  for matrix, wanted_specs in specs.items():
    found = [leaf for path, leaf in leaves(state).items() if path.endswith("blocks/mlp/" + matrix)]
    assert found and all(leaf.sharding.spec == wanted_specs[leaf.shape] for leaf in found)
  rest = [leaf for path, leaf in leaves(state).items() if path.endswith(("count", "scale"))]
  assert rest and all(leaf.sharding.is_fully_replicated for leaf in rest)


def test_statistics_of_square_matrices_lie_like_the_axis_they_keep():
  """optax averages v_row over the last axis and v_col over the first."""
  grads = {"w": jnp.asarray([[1.0, 1.0], [3.0, 3.0]])}
  transform = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
  _, state = transform.update(grads, transform.init(grads), grads)
  np.testing.assert_allclose(state.v_row["w"], [1, 9])
  np.testing.assert_allclose(state.v_col["w"], [5, 5])
  spec = P(None, "fsdp", "tensor")
  assert statistic_spec("v_row", (3, 8), (3, 8, 8), spec) == P(None, "fsdp")
  assert statistic_spec("v_col", (3, 8), (3, 8, 8), spec) == P(None, "tensor")
  assert statistic_spec("v_row", (3, 1), (3, 8, 8), spec) == P()
  assert statistic_spec("v_col", (8, 16), (8, 8, 16), spec) == P(None, "tensor")


def test_state_shardings_read_any_optax_state():
  params = toy_params()
  wanted = shardings_of(params)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.trace(0.9), jax.tree.map(lambda p: p.ndim == 3, params)),
    optax.adafactor(0.1, min_dim_size_to_factor=8),
    optax.adamw(1e-3),
  )
  abstract = jax.eval_shape(tx.init, params)
  found = state_shardings(abstract, params, wanted)
  assert jax.tree.structure(found) == jax.tree.structure(abstract)
  sharded = {
    jax.tree_util.keystr(path)
    for path, sharding in jax.tree_util.tree_leaves_with_path(found)
    if not sharding.is_fully_replicated
  }
  assert len(sharded) == 10  # trace, mu and nu, rows and columns of the two stacked matrices
  assert all("'up'" in path or "'down'" in path for path in sharded)

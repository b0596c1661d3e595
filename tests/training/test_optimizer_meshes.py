"""Updates on meshes: equal to one device's, and nothing is gathered."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import Compute, ModelConfig
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.sharding import param_shardings
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.storage.leaves import leaf_paths
from jaxllm.training.compile import make_program
from jaxllm.training.config import CheckpointConfig, OptimizerConfig, TrainingConfig
from jaxllm.training.optimizer import make_optimizer, state_shardings
from jaxllm.training.state import init_state
from jaxllm.training.step import make_train_step

D, F, R, E = 16, 32, 8, 4
# A mixture of experts with a dense first layer, an encoder of another depth, and a frozen quantized matrix.
AXES = {
  "blocks": {
    "attention": {
      "query": {"weight": ((3, D, D), ("layers", "embed", "heads"))},
      "key": {"weight": ((3, R, D), ("layers", None, "kv_heads"))},
      "output": {"weight": ((3, D, D), ("layers", "heads", "embed"))},
    },
    "norm": {"scale": ((3, D), ("layers", None))},
    "mlp": {"up": {"weight": ((1, D, F), ("layers", "embed", "mlp"))}},
    "moe": {
      "router": {"weight": ((2, D, E), ("layers", "embed", None))},
      "up": {"weight": ((2, E, D, F), ("layers", "expert", "embed", "mlp"))},
      "down": {"weight": ((2, E, F, D), ("layers", "expert", "mlp", "embed"))},
    },
  },
  "encoder": {"blocks": {"mlp": {"up": {"weight": ((5, D, F), ("layers", "embed", "mlp"))}}}},
  "embedding": {"tokens": ((48, D), ("vocab", "embed"))},
}
EVERYTHING = TrainingConfig(steps=10, ema_decay=0.9, spike_sigmas=3.0, on_bad_step="skip")
STEPS = 3


def _map(function):
  return jax.tree.map(lambda pair: function(*pair), AXES, is_leaf=lambda x: isinstance(x, tuple))


def params_and_gradients():
  rng = np.random.default_rng(0)
  params = _map(lambda shape, axes: jnp.asarray(rng.normal(size=shape), jnp.float32))
  gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(STEPS)]
  return params, gradients


def loss_fn(params, batch, key):
  """Linear, so that the batch is the gradient and computing it moves nothing between devices."""
  del key
  products = jax.tree.map(lambda p, g: (p * g).sum(), params, batch)
  return sum(jax.tree.leaves(products)), jnp.float32(1), {}


def build(name, params, shardings=None):
  config = OptimizerConfig(name=name, learning_rate=0.05, schedule="constant", warmup_steps=0)
  optimizer = make_optimizer(config, 10, params, shardings)
  step = make_train_step(loss_fn, optimizer, lambda step: jnp.float32(0.05), EVERYTHING, Compute(), config)
  return step, lambda params: init_state(params, optimizer, EVERYTHING, Compute(), config)


@functools.cache
def one_device(name):
  params, gradients = params_and_gradients()
  step, init = build(name, params)
  state = init(params)
  step = jax.jit(step)
  for gradient in gradients:
    state, metrics = step(state, gradient)
  return jax.device_get(state), jax.device_get(metrics)


COLLECTIVE = re.compile(
  r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


def collectives(hlo):
  """(kind, elements of its result) of every collective, and those that stand inside loops."""
  computations, name = {}, ""
  for line in hlo.splitlines():
    if line.endswith("{") and (found := re.match(r"(?:ENTRY )?%?([\w.-]+) ", line)):
      name = found[1]
    computations.setdefault(name, []).append(line)
  reached = re.findall(r"body=%?([\w.-]+)", hlo)
  for body in reached:  # grows while it is read: what the bodies call
    called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", "\n".join(computations[body]))
    reached += [computation for computation in called if computation not in reached]

  everywhere, in_loops = [], []
  for name, lines in computations.items():
    for result, kind in (found.groups() for found in map(COLLECTIVE.search, lines) if found):
      shapes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w\[([\d,]*)\]", result)]
      found = kind, sum(map(math.prod, shapes))
      everywhere.append(found)
      in_loops += [found] * (name in reached)
  return everywhere, in_loops


def test_collectives_are_found():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

  def gathers(x):
    whole = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    return jnp.sin(whole) @ jax.lax.fori_loop(0, 3, lambda _, y: y / y.sum(), x)

  hlo = jax.jit(gathers, in_shardings=split).lower(jnp.ones((16,))).compile().as_text()
  everywhere, in_loops = collectives(hlo)
  assert ("all-gather", 16) in everywhere and in_loops == [("all-reduce", 1)]


def ways(entry, mesh):
  return math.prod(mesh.shape[axis] for axis in ((entry,) if isinstance(entry, str) else entry or ()))


MESHES = [
  {"data": 8},
  {"fsdp": 8},
  {"tensor": 4, "fsdp": 2},
  {"expert": 4, "fsdp": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
  {"expert": 2, "fsdp": 2, "tensor": 2},
]
EVERY_OPTIMIZER = [(name, {"fsdp": 8}) for name in ("adamw", "lion", "sgd")]
EVERY_MESH = [(name, mesh) for name in ("adafactor", "muon") for mesh in MESHES]


@pytest.mark.parametrize("name, sizes", EVERY_OPTIMIZER + EVERY_MESH)
def test_a_step_equals_one_devices_and_gathers_nothing(name, sizes):
  params, gradients = params_and_gradients()
  mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
  shardings = param_shardings(params, _map(lambda shape, axes: axes), mesh, AxisRules())
  step, init = build(name, params, shardings)
  specs = state_shardings(jax.eval_shape(init, params), params, shardings)
  state = jax.jit(init, out_shardings=specs)(params)
  step = jax.jit(step, in_shardings=(specs, shardings), out_shardings=(specs, None))
  compiled = step.lower(state, gradients[0]).compile()
  for gradient in gradients:
    state, metrics = compiled(state, jax.device_put(gradient, shardings))

  wanted_state, wanted_metrics = one_device(name)
  for path, want in leaf_paths((wanted_state, wanted_metrics)).items():
    got = leaf_paths((state, metrics))[path]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=path)

  everywhere, in_loops = collectives(compiled.as_text())
  assert not in_loops
  assert {kind for kind, _ in everywhere} <= {"all-reduce", "all-to-all"}
  # Norms and means are sums of scalars; Adafactor's rows and columns are sums of vectors.
  leaves = jax.tree.leaves(params)
  numbers = 4 * sum(math.prod(leaf.shape[:-2]) for leaf in leaves)
  vectors = sum(leaf.size // n for leaf in leaves for n in leaf.shape[-2:] if leaf.ndim > 1)
  summed = sum(size for kind, size in everywhere if kind == "all-reduce")
  assert summed <= numbers + (vectors if name == "adafactor" else 0)

  # Muon moves what a device holds of a split stack (padded to whole layers for every device) there and back.
  moved = []
  if name == "muon":
    for path, sharding in leaf_paths(shardings).items():
      k = math.prod(ways(entry, mesh) for entry in sharding.spec[-2:])
      if path.endswith("weight") and k > 1:
        *stack, height, width = sharding.shard_shape(leaf_paths(params)[path].shape)
        moved += 2 * [-(-math.prod(stack) // k) * k * height * width]
  assert sorted(size for kind, size in everywhere if kind == "all-to-all") == sorted(moved)


def test_the_compiled_program_exchanges_every_stack_twice():
  model = ModelConfig(vocab_size=64, embed_dim=16, num_layers=3, num_heads=2, mlp_dim=32, max_seq_len=16)
  training = TrainingConfig(steps=10, batch_size=8, seq_len=8)
  mesh = MeshConfig(data=1, fsdp=8)
  program = make_program(model, training, OptimizerConfig(name="muon"), mesh, make_mesh(mesh))
  everywhere, in_loops = collectives(program.step.lower(*program.arguments).compile().as_text())
  stacks = 7  # query, key, value, output; gate, up, down
  lookup = 1  # whose gradient exchanges its tokens
  assert [kind for kind, _ in everywhere].count("all-to-all") == 2 * stacks + lookup
  assert "all-to-all" not in [kind for kind, _ in in_loops]


def test_statistics_of_unequal_stacks_are_saved_and_loaded_on_another_mesh(tmp_path):
  params, _ = params_and_gradients()
  tree = {}
  for name, sizes in {"saved": {"fsdp": 8}, "loaded": {"expert": 2, "fsdp": 2, "tensor": 2}}.items():
    mesh = make_mesh(MeshConfig(**({"data": 1} | sizes)))
    shardings = param_shardings(params, _map(lambda shape, axes: axes), mesh, AxisRules())
    _, init = build("adafactor", params, shardings)
    abstract = jax.eval_shape(init, params)
    specs = state_shardings(abstract, params, shardings)
    tree[name] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, specs)
  numbers = iter(range(10**6))
  fill = lambda x: jax.device_put(jnp.full(x.shape, next(numbers), x.dtype), x.sharding)  # noqa: E731
  state = jax.tree.map(fill, tree["saved"])
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
  checkpoints.save(1, state, {})
  loaded = checkpoints.restore(tree["loaded"]).state
  for path, leaf in leaf_paths(loaded).items():
    np.testing.assert_array_equal(leaf, leaf_paths(state)[path], err_msg=path)
    assert leaf.sharding == leaf_paths(tree["loaded"])[path].sharding

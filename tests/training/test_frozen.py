"""What is trained and what is frozen are two trees: on every mesh, over every kind of base."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig
from jaxllm.models.config import ComputeConfig, ModelConfig, MoEConfig
from jaxllm.models.weights import dense, map_weights, without_adapters
from jaxllm.objectives.dpo import DPO
from jaxllm.parallel.batch import put_batch
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.peft.base import Full
from jaxllm.peft.dora import Dora
from jaxllm.peft.lora import Lora
from jaxllm.training.compile import make_program
from jaxllm.training.config import ModelInitConfig, OptimizerConfig, ParamRule, TrainingConfig
from jaxllm.training.start import Start

T, B = 8, 8
# Inputs of 512, so that blocks of 256 codes can be split in two
MODEL = ModelConfig(
  vocab_size=64, embed_dim=512, num_layers=2, num_heads=4, head_dim=16, num_kv_heads=2, mlp_dim=512, max_seq_len=T
)
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4, mlp_dim=512, capacity_factor=None))
TRAINING = TrainingConfig(batch_size=B, seq_len=T, steps=10)
# p <- p - gradient: what a step changes is the gradient
SGD = OptimizerConfig(
  name="sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, b1=0.0, weight_decay=0.0, clip_norm=None
)
SLOW = dataclasses.replace(SGD, learning_rate=0.02)  # where whole matrices are trained
LORA = Lora(rank=4, alpha=8.0)
KINDS = {
  "lora": LORA,
  "dora": Dora(rank=4, alpha=8.0),
  "more": Lora(
    rank=4, alpha=8.0, rank_pattern={".*/attention/.*": 2}, modules_to_save=("embedding/tokens", "mlp/gate")
  ),
}
ONE = MeshConfig(data=1)


def batch(seed=0):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 64, (B, T + 1)).astype(np.int32)
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy(),
    "segment_ids": np.ones((B, T), np.int32),
    "loss_weights": rng.random((B, T)).astype(np.float32),
  }


def program_of(mesh=ONE, model=MODEL, peft=LORA, quantize=None, optimizer=SGD, training=TRAINING, double=False, **more):
  group_size = 64 if quantize in ("int4", "nf4") else None
  start = Start(ModelInitConfig(quantize=quantize, group_size=group_size, double_quantize=double))
  compute = ComputeConfig(matmul="xla", attention="xla", elementwise="xla", cross_entropy="xla")
  devices = make_mesh(mesh)
  return make_program(model, training, optimizer, mesh, devices, compute_config=compute, peft=peft, start=start, **more)


def train(program, steps=3):
  state, frozen = program.init(jax.random.key(1), {})
  losses = []
  for i in range(steps):
    state, metrics = program.step(state, frozen, put_batch(batch(i), program.batch))
    losses.append(float(metrics["loss"]))
  return state, frozen, losses


@functools.cache
def on_one_device(quantize, experts, kind="lora", double=False):
  model, slow = EXPERTS if experts else MODEL, dict(optimizer=SLOW) if kind == "more" else {}
  state, _, losses = train(program_of(model=model, quantize=quantize, peft=KINDS[kind], double=double, **slow))
  return jax.device_get(state.params), losses


MESHES = [dict(data=8), dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, tensor=2)]


@pytest.mark.parametrize(
  "sizes, quantize",
  [
    *((sizes, None) for sizes in MESHES),
    *((sizes, "nf4") for sizes in MESHES),
    (MESHES[2], "int4"),
    (MESHES[2], "int8"),
  ],
  ids=lambda value: "x".join(value) if isinstance(value, dict) else value,
)
def test_adapters_on_meshes(sizes, quantize):
  """Three steps of adapters give one device's losses and gradients."""
  want, want_losses = on_one_device(quantize, False)
  state, frozen, losses = train(program_of(MeshConfig(**sizes), quantize=quantize))
  np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), jax.device_get(state.params), want)
  assert float(jnp.abs(state.params["blocks"]["mlp"]["up"]["weight"].b).max()) > 1e-3
  if quantize and sizes.get("fsdp") == 2:  # each device holds a part of the codes
    values = frozen["policy"]["blocks"]["mlp"]["up"]["weight"].base.values
    assert np.prod(values.sharding.shard_shape(values.shape)) * 4 == values.size


@pytest.mark.parametrize("kind, quantize, double", [("dora", None, 0), ("dora", "nf4", 0), ("more", "nf4", 1)])
def test_kinds_on_fsdp_and_tensor(kind, quantize, double):
  want, want_losses = on_one_device(quantize, False, kind, bool(double))
  mesh = MeshConfig(fsdp=4, tensor=2)
  slow = dict(optimizer=SLOW) if kind == "more" else {}
  program = program_of(mesh, quantize=quantize, peft=KINDS[kind], double=bool(double), **slow)
  state, frozen, losses = train(program)
  np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-5), jax.device_get(state.params), want)
  up = program.params["blocks"]["mlp"]["up"]["weight"]
  if double:
    assert (
      up.base.weight.scales.dtype == jnp.uint8 and state.params["blocks"]["mlp"]["gate"]["weight"].dtype == "float32"
    )


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("sizes", [dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2)], ids=lambda s: "x".join(s))
def test_experts_on_meshes(sizes, quantize, kind="lora"):
  want, want_losses = on_one_device(quantize, True, kind)
  state, _, losses = train(program_of(MeshConfig(**sizes), EXPERTS, KINDS[kind], quantize))
  np.testing.assert_allclose(losses, want_losses, rtol=5e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), jax.device_get(state.params), want)


def test_dora_on_experts_on_a_mesh():
  test_experts_on_meshes(dict(fsdp=2, expert=2, tensor=2), None, "dora")


def test_adapters_begin_as_the_base_and_learn_by_the_chain_rule():
  """The loss is the base's, and the gradients are those of the dense weight, through its two factors."""
  program = program_of(optimizer=dataclasses.replace(SGD, learning_rate=1.0))
  state, frozen = program.init(jax.random.key(1), {})
  b = jax.tree.map(lambda x: x + 0.02, state.params)
  state = dataclasses.replace(state, params=b)
  after, metrics = program.step(jax.tree.map(jnp.copy, state), frozen, put_batch(batch(), program.batch))
  full = program_of(peft=Full())
  merged = map_weights(dense, program.policy(state.params, frozen))
  start, _ = full.init(jax.random.key(1), {})
  moved, plain = full.step(
    dataclasses.replace(start, params=jax.tree.map(jnp.copy, merged)),
    full.init(jax.random.key(1), {})[1],
    put_batch(batch(), full.batch),
  )
  np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-5)
  for part, name in (("attention", "query"), ("attention", "output"), ("mlp", "up"), ("mlp", "down")):
    weight, was = (tree["blocks"][part][name]["weight"] for tree in (after.params, state.params))
    dense_gradient = merged["blocks"][part][name]["weight"] - moved.params["blocks"][part][name]["weight"]
    np.testing.assert_allclose(was.a - weight.a, 2 * dense_gradient @ was.b.mT, atol=2e-5)
    np.testing.assert_allclose(was.b - weight.b, 2 * was.a.mT @ dense_gradient, atol=2e-5)


def bytes_of(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_frozen_leaves_take_no_memory_but_their_own(quantize):
  """No gradient, moment or master of a frozen weight in the compiled step, and it goes in and not out."""
  adamw, training = OptimizerConfig(), dataclasses.replace(TRAINING, ema_decay=0.9)
  program = program_of(quantize=quantize, optimizer=adamw, training=training)
  memory = program.step.lower(*program.arguments).compile().memory_analysis()
  state, frozen, rows = program.arguments
  assert bytes_of(state.params) * 20 < bytes_of(frozen) * (1 if quantize is None else 8)
  metrics = 4096  # and padding
  assert memory.output_size_in_bytes <= bytes_of(state) + metrics
  assert memory.argument_size_in_bytes <= bytes_of(state) + bytes_of(frozen) + bytes_of(rows) + metrics
  full = program_of(peft=Full(), optimizer=adamw, training=training)
  whole = full.step.lower(*full.arguments).compile().memory_analysis()
  one_layer = sum(leaf.size // 2 for leaf in jax.tree.leaves(full.params["blocks"])) * 4
  matrices = sum(leaf.size for leaf in jax.tree.leaves(full.params["blocks"])) * 4
  extra = one_layer if quantize else 0  # dense, a layer at a time
  assert memory.temp_size_in_bytes < whole.temp_size_in_bytes - matrices + 2 * extra


def test_rules_freeze_too():
  """A rule with lr_scale 0 moves its parameters to the other tree."""
  rules = (ParamRule("embedding|norm", lr_scale=0.0),)
  program = program_of(peft=Full(), optimizer=dataclasses.replace(OptimizerConfig(), rules=rules))
  state, frozen, _ = train(program)
  assert state.params["embedding"]["tokens"] is None and frozen["policy"]["embedding"]["tokens"] is not None
  assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state) if "embedding" in str(path)]
  fresh = program_of(peft=Full()).init(jax.random.key(1), {})[0].params
  np.testing.assert_array_equal(frozen["policy"]["embedding"]["tokens"], fresh["embedding"]["tokens"])
  assert (
    float(jnp.abs(state.params["blocks"]["mlp"]["up"]["weight"] - fresh["blocks"]["mlp"]["up"]["weight"]).max()) > 0
  )


@pytest.mark.parametrize("pattern, peft", [("/a$", LORA), ("attention", LORA), ("magnitude", Dora(rank=4))])
def test_rules_freeze_no_part_of_an_adapter(pattern, peft):
  """No file would have it: checkpoints have what is trained, and the base's files what was there before."""
  optimizer = OptimizerConfig(rules=(ParamRule(pattern, lr_scale=0.0),))
  with pytest.raises(ConfigError, match=r"freeze blocks/attention/key/weight/\w+, a part of an adapter"):
    program_of(peft=peft, optimizer=optimizer)


def test_with_nothing_to_train_the_message_names_what_says_so():
  with pytest.raises(ConfigError, match="^peft and model_init freeze every parameter"):
    program_of(peft=Lora(targets=()))


def test_dropout_draws_anew_at_every_step_and_not_in_evaluation():
  program = program_of(peft=dataclasses.replace(LORA, dropout=0.5))
  state, frozen = program.init(jax.random.key(1), {})
  state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 0.05, state.params))
  rows = put_batch(batch(), program.batch)
  losses = [
    float(program.step(jax.tree.map(jnp.copy, dataclasses.replace(state, step=jnp.int32(i))), frozen, rows)[1]["loss"])
    for i in (0, 0, 1)
  ]
  assert losses[0] == losses[1] != losses[2]
  nll = [float(program.evaluate(state.params, frozen, rows)["nll"][0]) for _ in range(2)]
  assert nll[0] == nll[1]


def test_the_policy_without_its_adapter():
  params = program_of(quantize="nf4").params
  bare = without_adapters(params)
  assert bare["blocks"]["mlp"]["up"]["weight"] is params["blocks"]["mlp"]["up"]["weight"].base


def test_qlora_freezes_two_fifths_of_the_bytes():
  """Of SmolLM2-135M's sizes, with the embedding, which is the head too, in float32."""
  smol = ModelConfig(
    vocab_size=49152,
    embed_dim=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    max_seq_len=T,
    tie_embeddings=True,
  )
  sizes = [
    bytes_of(program_of(model=smol, peft=Lora(rank=8), quantize=quantize, double=bool(quantize)).frozen)
    for quantize in (None, "nf4")
  ]
  assert sizes[0] == 4 * 134_515_008
  assert sizes[1] <= 0.4 * sizes[0]


@pytest.mark.parametrize("peft", [Full(), Lora(rank=4, modules_to_save=("final_norm",))], ids=["full", "saved"])
def test_the_reference_is_the_policy_as_it_began(peft):
  """Where what is under the adapters is trained too, so much of it is kept, and no more."""
  objective = DPO()
  rows = {name: batch(seed) for seed, name in enumerate(("chosen", "rejected"))}
  data = DataConfig(task="preference", packing="none")
  program = program_of(peft=peft, objective=objective, data=data)
  state, frozen = program.init(jax.random.key(1), {})
  kept = jax.tree.leaves(frozen["reference"])
  assert len(kept) == (1 if isinstance(peft, Lora) else len(jax.tree.leaves(program.params)))
  metrics = []
  for _ in range(3):
    state, found = program.step(state, frozen, put_batch(rows, program.batch))
    metrics.append(jax.device_get(found))
  assert float(metrics[0]["rewards/margins"]) == 0.0
  # A reference that moved with the policy would give no reward
  assert abs(float(metrics[2]["rewards/chosen"])) > 1e-4


def test_noise_draws_anew_at_every_step_and_not_in_evaluation():
  noisy = program_of(training=dataclasses.replace(TRAINING, neftune_alpha=5.0))
  rows = put_batch(batch(), noisy.batch)

  def losses_of(program, steps):
    state, frozen = program.init(jax.random.key(1), {})
    at = lambda i: dataclasses.replace(state, step=jnp.int32(i))  # noqa: E731
    losses = [float(program.step(jax.tree.map(jnp.copy, at(i)), frozen, rows)[1]["loss"]) for i in steps]
    return losses, float(program.evaluate(state.params, frozen, rows)["nll"][0])

  losses, heldout = losses_of(noisy, (0, 0, 1))
  plain, same = losses_of(program_of(), (0,))
  assert losses[0] == losses[1] and len({*losses, *plain}) == 3
  assert heldout == same

"""The compiled step of the real model: it learns, whatever the mesh and the micro-batches."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from jaxllm.data.config import DataConfig, TokenizerConfig
from jaxllm.models.config import ComputeConfig, ModelConfig, MoEConfig
from jaxllm.parallel.batch import put_batch
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program
from jaxllm.training.config import OptimizerConfig, RunConfig, TrainingConfig
from jaxllm.training.flops import matmul_parameters
from jaxllm.training.startup import startup_table

MODEL = ModelConfig(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=64, max_seq_len=16)
TRAINING = TrainingConfig(steps=200, batch_size=8, seq_len=16)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.0)


def batch(seed=0, uneven=True):
  """Two documents a row, and rows with very different numbers of targets."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, MODEL.vocab_size, (8, 17)).astype(np.int32)
  tokens[:, 0], tokens[:, 7] = np.arange(8), np.arange(8, 16)  # every context differs, so nothing is left to chance
  segments = np.repeat([[1] * 7 + [2] * 9], 8, axis=0).astype(np.int32)
  positions = np.concatenate([np.arange(7), np.arange(9)])[None].repeat(8, axis=0).astype(np.int32)
  weights = np.ones((8, 16), np.float32)
  weights[:, 6] = 0  # the last token of a document predicts nothing here
  if uneven:
    for row in range(8):
      weights[row, : 2 * row] = 0
  return {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "positions": positions,
    "segment_ids": segments,
    "loss_weights": weights,
  }


def losses(steps=4, training=TRAINING, mesh=MeshConfig(data=1), model=MODEL, repeat=False, **compute):
  program = make_program(model, training, OPTIMIZER, mesh, make_mesh(mesh), compute_config=ComputeConfig(**compute))
  state, frozen = program.init(jax.random.key(0), {})
  history = []
  for i in range(steps):
    state, metrics = program.step(state, frozen, put_batch(batch(0 if repeat else i), program.batch))
    history.append(metrics["loss"])
  return np.array(jax.device_get(history))


@pytest.fixture(scope="module")
def reference():
  return losses()


def test_one_batch_is_learnt_by_heart():
  history = losses(steps=300, repeat=True)
  assert history[0] == pytest.approx(np.log(64), abs=0.2)
  assert history[-1] < 0.01


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_micro_batches_change_nothing(reference, accumulation):
  training = dataclasses.replace(TRAINING, accumulation=accumulation)
  np.testing.assert_allclose(losses(training=training), reference, rtol=2e-5)


@pytest.mark.parametrize(
  "mesh",
  [
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=2, fsdp=2, context=2),
  ],
  ids=["data", "fsdp", "data x fsdp x tensor", "data x fsdp x context"],
)
def test_every_mesh_trains_alike(reference, mesh):
  np.testing.assert_allclose(losses(mesh=mesh), reference, rtol=5e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows(reference, dtype):
  np.testing.assert_allclose(losses(dtype=dtype), reference, rtol=2e-2)


def test_the_cpu_kernels_and_xla_train_alike(reference):
  plain = dict.fromkeys(("attention", "matmul", "elementwise", "cross_entropy", "grouped_matmul"), "xla")
  np.testing.assert_allclose(losses(**plain), reference, rtol=2e-5)


def test_a_head_bias_and_soft_cap_train(reference):
  model = dataclasses.replace(MODEL, head_bias=True, logit_softcap=20.0, tie_embeddings=False)
  history = losses(steps=30, model=model, repeat=True)
  assert history[-1] < history[0] - 1


def test_experts_train_and_are_reported():
  """On a mesh with an expert axis, in micro-batches; the start-up table says what a token meets."""
  model = dataclasses.replace(MODEL, moe=MoEConfig(num_experts=4, mlp_dim=32, first_dense_layers=1))
  training = dataclasses.replace(TRAINING, accumulation=2)
  mesh = MeshConfig(data=2, expert=2)
  program = make_program(model, training, OPTIMIZER, mesh, make_mesh(mesh))
  compiled = program.step.lower(*program.arguments).compile()
  (state, frozen), rows = program.init(jax.random.key(0), {}), put_batch(batch(), program.batch)
  for _ in range(20):
    state, metrics = compiled(state, frozen, rows)
  assert 1.5 < metrics["moe/load_balance"] < 4 and metrics["moe/z"] > 0 and metrics["moe/dropped"] == 0
  assert metrics["nll"] < 3.5
  data = DataConfig(tokenizer=TokenizerConfig(vocab_size=64))
  run = RunConfig(model=model, training=training, optimizer=OPTIMIZER, data=data)
  prepared = types.SimpleNamespace(total=lambda split, unit: 1000)
  table = dict(startup_table(program, compiled, run, prepared, 0.0))
  assert table["parameters"].endswith(f"a token is multiplied by {matmul_parameters(model):,}")

"""The example of docs/adding_an_objective.md is an objective that trains, and means what it says."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.base.settings import from_mapping, to_mapping
from jaxllm.models.config import ModelConfig
from jaxllm.objectives.registry import AnyObjective
from jaxllm.parallel.batch import put_batch
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program
from jaxllm.training.config import OptimizerConfig, TrainingConfig

PAGE = Path(__file__).parents[2] / "docs" / "adding_an_objective.md"
MODEL = ModelConfig(vocab_size=50, embed_dim=16, num_layers=2, num_heads=2, max_seq_len=12)


@pytest.fixture(scope="module")
def row_mean():
  [example] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
  assert len(example.splitlines()) < 40
  names = {"__name__": "row_mean"}
  exec(example, names)
  return names["RowMean"]


def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 50, (4, 13)).astype(np.int32)
  lengths = np.array([12, 3, 7, 1])[:, None]
  mask = np.arange(12) < lengths
  return {
    "inputs": np.where(mask, tokens[:, :-1], 0),
    "targets": np.where(mask, tokens[:, 1:], 0),
    "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12)),
    "segment_ids": mask.astype(np.int32),
    "loss_weights": mask.astype(np.float32),
  }


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_count_alike(row_mean, power, accumulation):
  training = TrainingConfig(steps=2, batch_size=4, seq_len=12, accumulation=accumulation)
  mesh = MeshConfig(data=1)
  program = make_program(MODEL, training, OptimizerConfig(), mesh, make_mesh(mesh), row_mean(power=power))
  (state, frozen), rows = program.init(jax.random.key(0), {}), batch()
  params = state.params

  @jax.jit
  def negative_log_likelihood(params):
    model = nnx.merge(program.graph, params)
    logits = model(rows["inputs"], positions=rows["positions"], segment_ids=rows["segment_ids"])[0]
    picked = np.arange(4)[:, None], np.arange(12), rows["targets"]
    return -jax.nn.log_softmax(logits)[picked]

  losses, mask = np.asarray(negative_log_likelihood(params), np.float64), rows["loss_weights"]
  of_rows = (losses * mask).sum(1) / mask.sum(1)
  want = of_rows.mean() if power else (losses * mask).sum() / mask.sum()
  metrics = program.step(state, frozen, put_batch(rows, program.batch))[1]
  assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)


def test_a_config_chooses_it_by_name(row_mean):
  @dataclasses.dataclass(frozen=True)
  class Job:
    objective: AnyObjective | row_mean = row_mean()

  job = from_mapping(Job, {"objective": {"name": "row_mean", "power": 0.5}})
  assert job.objective == row_mean(0.5)
  assert from_mapping(Job, to_mapping(job)) == job
  with pytest.raises(ConfigError, match=r"objective\.power belongs to objective\.name 'row_mean', not to 'causal_lm'"):
    from_mapping(Job, {"objective": {"name": "causal_lm", "power": 0.5}})

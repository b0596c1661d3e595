"""Two toy objectives and toy batches prove the contracts: other models, pairs, and batches that the weights write."""

import dataclasses
import json
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.config import load_config
from jaxllm.inference.load import load_model
from jaxllm.objectives.base import Loss, Objective
from jaxllm.parallel.batch import local_rows
from jaxllm.training.batches import disk_batches
from jaxllm.training.loop import train


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
  """Cross-entropy against a teacher's probabilities (Hinton et al., arXiv 1503.02531)."""

  name: ClassVar[str] = "toy_distill"
  architectures: ClassVar = ("decoder",)
  heads_and_tasks: ClassVar = (("lm", "text"),)
  others: ClassVar = ("teacher",)

  teacher: str = ""

  def __call__(self, models, batch, key=None):
    logits, target = (
      models[name](batch["inputs"], positions=batch["positions"], segment_ids=batch["segment_ids"])[0]
      for name in ("policy", "teacher")
    )
    each = -(jax.nn.softmax(target) * jax.nn.log_softmax(logits)).sum(-1)
    total, weight = (each * batch["loss_weights"]).sum(), batch["loss_weights"].sum()
    return Loss(total, weight, {"nll": (total, weight)})


@dataclasses.dataclass(frozen=True)
class Pairs(Objective):
  """-log sigmoid of how much more the policy prefers the chosen row than it did as it began."""

  name: ClassVar[str] = "toy_pairs"
  architectures: ClassVar = ("decoder",)
  heads_and_tasks: ClassVar = (("lm", "text"),)
  others: ClassVar = ("reference",)

  beta: float = 2.0

  def row(self, data, seq_len):
    return {"chosen": super().row(data, seq_len), "rejected": super().row(data, seq_len)}

  def __call__(self, models, batch, key=None):
    def log_probability(name, part):
      logits = models[name](batch[part]["inputs"], positions=batch[part]["positions"])[0]
      each = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[part]["targets"][..., None], -1)[..., 0]
      return (each * batch[part]["loss_weights"]).sum(-1)

    gain = {p: log_probability("policy", p) - log_probability("reference", p) for p in ("chosen", "rejected")}
    margin = gain["chosen"] - gain["rejected"]
    rows = jnp.float32(margin.size)
    metrics = {"rewards/margins": (margin.sum(), rows)}
    return Loss(-jax.nn.log_sigmoid(self.beta * margin).sum(), rows, metrics)


class Written:
  """Rows that the policy itself continues, greedily, from a random start: a rollout without a reward."""

  heldout = None

  def __init__(self, program, run, prepared, pairs=False):
    self.rows, self.pairs, self.count, self.asked = local_rows(program.batch), pairs, 0, []
    self.length, self.vocab = run.training.seq_len, run.model.vocab_size
    self.size = run.training.batch_size
    self.forward = jax.jit(lambda params, tokens: nnx.merge(program.graph, params)(tokens)[0].argmax(-1))

  @property
  def epochs(self):
    return float(self.count)

  def next(self, policy):
    def row(targets):
      positions = np.broadcast_to(np.arange(self.length, dtype=np.int32), targets.shape).copy()
      weights = np.ones(targets.shape, np.float32)
      arrays = {"inputs": tokens[:, :-1], "targets": targets, "positions": positions}
      return arrays | {"segment_ids": np.ones_like(targets), "loss_weights": weights}

    rng = np.random.default_rng(self.count)
    tokens = rng.integers(0, self.vocab, (self.size, self.length + 1)).astype(np.int32)
    written = np.asarray(self.forward(policy(), tokens[:, :-1])).astype(np.int32)
    self.asked.append(written)
    self.count += 1
    batch = {"chosen": row(written), "rejected": row(tokens[:, 1:])} if self.pairs else row(written)
    return jax.tree.map(lambda array: array[list(self.rows)], batch)

  def get_state(self):
    return {"count": self.count}

  def set_state(self, state):
    self.count = state["count"]

  def close(self):
    pass


LORA = {"peft.kind": "lora", "peft.rank": 2, "optimizer.learning_rate": 0.05, "optimizer.schedule": "constant"}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "training.batch_size": 8}


def losses(directory):
  rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def run(job, directory, objective=None, batches=disk_batches, **keys):
  config = load_config(str(job), list({"optimizer.schedule": "constant", "training.batch_size": 8, **keys}.items()))
  return train(config if objective is None else dataclasses.replace(config, objective=objective), directory, batches)


@pytest.fixture(scope="module")
def teacher(job, tmp_path_factory):
  """A model of another size, as a directory."""
  directory = tmp_path_factory.mktemp("teacher")
  run(job, directory / "run", **{"model.num_layers": 1, "training.seed": 5})
  load_model(directory / "run").save(directory / "model")
  return directory / "model"


def twice_and_on_a_mesh(job, tmp_path, objective, batches=disk_batches, **keys):
  """The losses of a run, after it was shown that an interrupted one has the same and one on a mesh too."""
  run(job, tmp_path / "whole", objective, batches, **keys)
  for steps in (3, 6):
    run(job, tmp_path / "parts", objective, batches, **keys, **{"training.steps": steps})
  whole = losses(tmp_path / "whole")
  assert losses(tmp_path / "parts") == whole
  run(job, tmp_path / "mesh", objective, batches, **keys, **MESH)
  np.testing.assert_allclose(list(losses(tmp_path / "mesh").values()), list(whole.values()), rtol=2e-4)
  return whole


def test_distillation(job, teacher, tmp_path):
  whole = twice_and_on_a_mesh(job, tmp_path, Distill(teacher=str(teacher)))
  assert whole[6] < whole[1]
  manifest = json.loads((tmp_path / "whole" / "checkpoints" / "6" / "manifest.json").read_text())
  assert not any("teacher" in name for name in manifest["tree"])


def test_pairs_against_the_policy_without_its_adapter(job, tmp_path):
  """The first loss is log 2, and the reference has no memory of its own."""
  batches = lambda *args: Written(*args, pairs=True)  # noqa: E731
  whole = twice_and_on_a_mesh(job, tmp_path, Pairs(), batches, **LORA)
  assert whole[1] == pytest.approx(np.log(2), abs=1e-6) and whole[6] < whole[1]


def test_pairs_without_adapters_keep_a_reference(job, tmp_path):
  batches = lambda *args: Written(*args, pairs=True)  # noqa: E731
  whole = twice_and_on_a_mesh(job, tmp_path, Pairs(), batches)
  assert whole[1] == pytest.approx(np.log(2), abs=1e-6) and whole[6] < whole[1]


def test_batches_that_the_weights_write(job, tmp_path):
  """Each batch comes from the weights of its step."""
  made = []

  def batches(*args):
    made.append(Written(*args))
    return made[-1]

  twice_and_on_a_mesh(job, tmp_path, None, batches)
  whole, first, second, mesh = (np.stack(one.asked) for one in made)
  np.testing.assert_array_equal(np.concatenate([first, second]), whole)
  assert (whole == mesh).mean() > 0.99  # ties may fall otherwise

"""DPO with its reference's log-probabilities on disk is DPO, without a reference in memory or in the step."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.config import load_config
from jaxllm.inference.load import load_model
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program
from jaxllm.training.loop import train
from jaxllm.training.scores import digests

KEYS = {
  "data.task": "preference",
  "data.packing": "none",
  "objective.name": "dpo",
  "objective.beta": 0.5,
  "training.eval_every": 2,
}
LORA = {"peft.kind": "lora", "peft.rank": 4}
NF4 = {"model_init.quantize": "nf4", "model_init.group_size": 32}
CACHED = {"objective.cache_reference": True}


@pytest.fixture
def pairs(chat_job, tmp_path, door):
  """The config file of DPO on forty pairs, prepared."""
  rows = [{"prompt": f"{n}+1?", "chosen": f"it is {n + 1}", "rejected": f"no {n + 2}"} for n in range(40)]
  (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
  config = Path(chat_job.removeprefix("--config="))
  config.write_text(config.read_text().replace(', format="alpaca", columns=columns', ""))
  code, _, err = door("prepare", chat_job, *flags(KEYS))
  assert code == 0, err
  return config


def flags(keys):
  return [f"--config.{name}={value}" for name, value in keys.items()]


def run(pairs, directory, **keys):
  return train(load_config(str(pairs), list((KEYS | keys).items())), directory)


def lines(directory):
  """All figures that are not of time, in order."""
  times = ("tokens_per_second", "step_time_s", "memory_gib")
  rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
  return [{name: value for name, value in row.items() if name not in times} for row in rows]


@pytest.fixture
def models(pairs, tmp_path):
  """Two models to begin with, or to be the reference."""
  for name, seed in (("base", 1), ("other", 2)):
    keys = {"training.seed": seed, "optimizer.learning_rate": 0.1, "training.steps": 2, "training.eval_every": 0}
    run(pairs, tmp_path / f"run_{name}", **keys)
    load_model(tmp_path / f"run_{name}").save(tmp_path / name)
  return {name: str(tmp_path / name) for name in ("base", "other")}


JOBS = {
  "fresh, adapters": LORA,
  "adapters": LORA | {"model_init.path": "base"},
  "quantized": LORA | NF4 | {"model_init.path": "base"},
  "all trained": {"model_init.path": "base", "objective.length_normalized": True},
  "another reference": LORA | {"model_init.path": "base", "objective.reference": "other"},
  "fresh, all trained, on a mesh": {"mesh.data": 2, "mesh.fsdp": 2},
}
QUICK = ("quantized", "another reference")


@pytest.mark.parametrize(
  "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in JOBS]
)
def test_cached_or_not_the_losses_are_the_same(pairs, models, tmp_path, name):
  keys = {key: models.get(value, value) for key, value in JOBS[name].items()}
  for kind, more in (("direct", {}), ("cached", CACHED)):
    run(pairs, tmp_path / kind, **keys, **more)
  direct, cached = lines(tmp_path / "direct"), lines(tmp_path / "cached")
  assert [row.keys() for row in cached] == [row.keys() for row in direct]
  losses = [[row[key] for row in rows for key in row if key.endswith("loss")] for rows in (direct, cached)]
  np.testing.assert_allclose(*losses, rtol=2e-6, atol=1e-6)
  assert "eval/rewards/accuracies" in cached[-1] and cached[-1]["step"] == 6
  if name == "another reference":
    assert cached[0]["rewards/chosen"] == pytest.approx(direct[0]["rewards/chosen"], rel=1e-3)
    assert abs(cached[0]["rewards/chosen"]) > 1e-3
  else:
    assert losses[1][0] == pytest.approx(np.log(2), abs=1e-6)


def test_the_reference_is_neither_in_memory_nor_in_the_step(pairs, models):
  def program(**keys):
    config = load_config(str(pairs), list((KEYS | keys).items()))
    return make_program(
      config.model, config.training, config.optimizer, config.mesh, make_mesh(config.mesh), config.objective,
      config.data, config.compute, config.peft,
    )  # fmt: skip

  for keys in (LORA, {}):
    direct, cached = program(**keys), program(**keys, **CACHED)
    work = [p.step.lower(*p.arguments).compile().cost_analysis()["flops"] for p in (direct, cached)]
    assert work[1] < 0.95 * work[0]
    assert set(cached.frozen) == {"policy"} and set(direct.frozen) == ({"policy"} if keys else {"policy", "reference"})


@pytest.mark.parametrize("keys", [LORA, {}], ids=["adapters", "all trained"])
def test_interrupted_it_is_bit_identical(pairs, models, tmp_path, keys):
  keys = keys | CACHED | {"model_init.path": models["base"]}
  run(pairs, tmp_path / "whole", **keys)
  kept = (tmp_path / "whole" / "scores.npz").read_bytes()
  for steps in (2, 3, 6):
    run(pairs, tmp_path / "parts", **keys, **{"training.steps": steps})
    assert (tmp_path / "parts" / "scores.npz").read_bytes() == kept
  parts = [row for row in lines(tmp_path / "parts") if row["step"] != 3 or "loss" in row]
  assert parts == lines(tmp_path / "whole")
  run(pairs, tmp_path / "mesh", **keys, **{"mesh.data": 2, "mesh.fsdp": 2})
  losses = [[row["loss"] for row in lines(tmp_path / name) if "loss" in row] for name in ("whole", "mesh")]
  np.testing.assert_allclose(*losses, atol=1e-4, rtol=1e-2)


@pytest.mark.slow
def test_two_processes_train_as_one_does(pairs, tmp_path):
  """Each has all scores; the file is that of one process. The second time it is read."""
  from test_hosts import ends, start, start_two

  job = flags(KEYS | CACHED | LORA | {"training.batch_size": 8})
  for steps in (4, 6):
    ends(start_two(pairs, tmp_path / "two", *job, f"--config.training.steps={steps}"))
  ends([start(pairs, tmp_path / "one", 1, *job)])
  two, one = (np.load(tmp_path / name / "scores.npz") for name in ("two", "one"))
  assert two["facts"] == one["facts"] and (two["digests"] == one["digests"]).all()
  np.testing.assert_allclose(two["scores"], one["scores"], rtol=1e-4)
  losses = [[row["loss"] for row in lines(tmp_path / name) if "loss" in row] for name in ("two", "one")]
  assert len(losses[0]) == 6
  np.testing.assert_allclose(*losses, rtol=1e-2, atol=1e-4)


def test_what_changes_is_noticed(pairs, models, tmp_path, door):
  keys = LORA | CACHED | {"model_init.path": models["base"], "checkpoint.every": 2}
  run(pairs, tmp_path / "run", **keys, **{"training.steps": 2})
  file = tmp_path / "run" / "scores.npz"
  good = file.read_bytes()

  def fails(match, **more):
    with pytest.raises(CheckpointError, match=match):
      run(pairs, tmp_path / "run", **keys, **more)

  with np.load(file) as kept:
    arrays = dict(kept)
  assert arrays["scores"].shape == (40, 2) and (arrays["scores"] < -1).all()
  np.savez(file, **(arrays | {"scores": arrays["scores"] + np.float32(0.5)}))
  fails(r"the model has changed since .*scores.npz was computed: row 0 of the data had the scores \[-")
  np.savez(file, **(arrays | {"digests": arrays["digests"] + np.uint8(1)}))
  fails("has not the row 0 of the data")
  file.write_bytes(good[:100])
  fails("is damaged; delete it")
  file.write_bytes(good)
  shutil.copytree(models["base"], tmp_path / "kept")
  shutil.rmtree(models["base"])
  shutil.copytree(models["other"], models["base"])
  fails("the model has changed since")
  shutil.rmtree(models["base"])
  shutil.copytree(tmp_path / "kept", models["base"])
  rows = (tmp_path / "qa.jsonl").read_text()
  (tmp_path / "qa.jsonl").write_text(rows.replace("it is 7", "it is seven"))
  assert door("prepare", f"--config={pairs}", *flags(KEYS))[0] == 0
  fails("the data has changed since")
  (tmp_path / "qa.jsonl").write_text(rows)
  assert door("prepare", f"--config={pairs}", *flags(KEYS))[0] == 0
  assert run(pairs, tmp_path / "run", **keys)["step"] == 6


def test_what_cannot_be_cached(pairs, tmp_path):
  for name, value in (("cache_reference", True), ("reference", "x")):
    with pytest.raises(ConfigError, match=f"objective.{name} is set, and objective.reference_free too"):
      run(pairs, tmp_path / "run", **{f"objective.{name}": value, "objective.reference_free": True})

  class Endless:
    heldout = None

  config = load_config(str(pairs), list((KEYS | CACHED).items()))
  with pytest.raises(ConfigError, match="objective.cache_reference needs prepared data"):
    train(config, tmp_path / "run", lambda *_: Endless())


def test_rows_are_told_apart_by_all_that_they_hold():
  batch = {"chosen": {"inputs": np.zeros((4, 3), np.int32)}, "rejected": {"loss_weights": np.ones((4, 3), np.float32)}}
  batch["chosen"]["inputs"][1, 2] = 1
  batch["rejected"]["loss_weights"][2, 0] = 0
  found = digests(batch)
  assert len(set(found)) == 3 and found[0] == found[3]

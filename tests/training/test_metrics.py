"""The run directory, metrics.jsonl and the rule for what a resumed run may change."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.errors import ConfigError, UserError
from jaxllm.training.files import read_metrics
from jaxllm.training.metrics import MetricsLogger, check_same_run, hold_run_directory, open_run_directory

CONFIG = {
  "model": {"embed_dim": 64, "layer_pattern": ("local", "global"), "rope_scaling": None},
  "training": {"steps": 100, "batch_size": 8},
  "optimizer": {"rules": ({"pattern": ".*", "lr_scale": 1.0},)},
  "data": {"workers": 0, "prefetch": 16, "dir": "data/a"},
  "mesh": {"fsdp": 1},
  "logging": {"every": 10},
  "checkpoint": {"every": 10},
  "profile": {"steps": 0},
}


def changed(**changes):
  config = json.loads(json.dumps(CONFIG))
  for key, value in changes.items():
    group, name = key.split("__")
    config.setdefault(group, {})[name] = value
  return config


class Recorder:
  def __init__(self):
    self.calls = []

  def log(self, step, metrics):
    self.calls.append(("log", step, dict(metrics)))

  def log_text(self, step, name, text):
    self.calls.append(("text", step, name, text))

  def close(self):
    self.calls.append(("close",))


def test_config_json_says_whose_run_it_is(tmp_path):
  directory = open_run_directory(tmp_path / "a" / "run", CONFIG)
  saved = json.loads((directory / "config.json").read_text())
  environment = saved.pop("environment")
  assert saved == json.loads(json.dumps(CONFIG))
  import jax
  import optax

  assert environment["versions"]["jax"] == jax.__version__
  assert environment["versions"]["optax"] == optax.__version__
  assert environment["devices"] == f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  assert {"git_commit", "host", "command", "processes"} <= environment.keys()


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"training__steps": 101},
    {"logging__every": 1, "logging__new": True},
    {"checkpoint__every": 7},
    {"profile__steps": 3},
    {"mesh__fsdp": 8},
    {"data__workers": 4, "data__prefetch": 1},
  ],
)
def test_what_a_resumed_run_may_change(tmp_path, change):
  open_run_directory(tmp_path, CONFIG)
  open_run_directory(tmp_path, changed(**change))
  saved = json.loads((tmp_path / "config.json").read_text())
  del saved["environment"]
  assert saved == changed(**change), "config.json is that of the latest start"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model__embed_dim": 128}, "model.embed_dim was 64 and is now 128"),
    (
      {"model__layer_pattern": ["local"]},
      r"model.layer_pattern was \['local', 'global'\] and is now \['local'\]",
    ),
    ({"training__steps": 99}, "training.steps was 100 and may only grow, not become 99"),
    ({"training__seed": 1}, "training.seed was 'unset' and is now 1"),
    ({"data__dir": "b"}, "data.dir was 'data/a' and is now 'b'"),
    (
      {"model__embed_dim": 1, "model__a": 1, "model__b": 1, "model__c": 1, "model__d": 1},
      "model.embed_dim was .*, model.a was .*, model.b was .* and 2 more$",
    ),
  ],
)
def test_another_config_is_refused_by_its_first_keys(tmp_path, change, message):
  with pytest.raises(ConfigError, match=message):
    check_same_run(CONFIG, changed(**change))
  open_run_directory(tmp_path, CONFIG)
  before = (tmp_path / "config.json").read_bytes()
  with pytest.raises(ConfigError, match=f"{tmp_path} holds another run: .*; choose another --workdir"):
    open_run_directory(tmp_path, changed(**change))
  assert (tmp_path / "config.json").read_bytes() == before


def test_a_directory_that_cannot_be_made_or_read_is_said_in_one_line(tmp_path):
  file = tmp_path / "file"
  file.touch()
  with (
    pytest.raises(ConfigError, match=f"cannot create the run directory {file}/run: "),
    hold_run_directory(file / "run"),
  ):
    pass
  with pytest.raises(ConfigError, match=f"cannot read or write {file}/run/config.json: "):
    open_run_directory(file / "run", CONFIG)
  (tmp_path / "config.json").write_text("[1, 2")
  with pytest.raises(ConfigError, match=f"{tmp_path}/config.json is damaged; restore it, or choose another"):
    open_run_directory(tmp_path, CONFIG)


def test_the_run_directory_is_made_and_held(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with hold_run_directory("a/run") as directory:
    assert directory == Path("a/run") and [path.name for path in directory.iterdir()] == ["lock"]
    with pytest.raises(UserError, match="^a/run is in use by "), hold_run_directory("a/run"):
      pass
  with pytest.raises(ConfigError, match="^gs://b/run is a URL"), hold_run_directory("gs://b/run"):
    pass
  with pytest.raises(ConfigError, match="^gs://b/run is a URL"):
    open_run_directory(Path("gs://b/run"), CONFIG)
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_every_line_is_json_and_floats_survive(tmp_path):
  recorder = Recorder()
  with MetricsLogger(tmp_path, trackers=[recorder]) as logger:
    logger.log(1, {"loss": jnp.float32(0.1), "tokens": 2**40, "learning_rate": 3e-4})
    logger.log(2, {"loss": float("nan"), "grad_norm": np.float32("inf"), "eval/loss": -float("inf")})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2, "flushed before close"
    logger.log_text(2, "sample/0", "once upon")

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  text = (tmp_path / "metrics.jsonl").read_text()
  first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
  assert np.float32(first["loss"]) == np.float32(0.1) and first["tokens"] == 2**40
  assert second == {"step": 2, "loss": None, "grad_norm": None, "eval/loss": None}
  assert (tmp_path / "samples" / "00000002-sample-0.txt").read_text() == "once upon"
  kinds = [call[:2] for call in recorder.calls]
  assert kinds == [("log", 1), ("log", 2), ("text", 2), ("close",)]
  assert np.isnan(recorder.calls[1][2]["loss"]), "trackers can show NaN"


@pytest.mark.parametrize("resumed, expected", [(20, [10, 20]), (None, []), (25, [10, 20]), (99, [10, 20, 30])])
def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path, resumed, expected):
  with MetricsLogger(tmp_path) as logger:
    for step in (10, 20, 30):
      logger.log(step, {"loss": 1 / step})
  path = tmp_path / "metrics.jsonl"
  original = path.read_text().splitlines()
  path.write_text(path.read_text() + '{"step": 40, "lo')  # killed in the middle of a line
  with MetricsLogger(tmp_path, resumed_step=resumed) as logger:
    assert [line["step"] for line in read_metrics(path)] == expected
    logger.log(100, {"loss": 0.5})
  assert [line["step"] for line in read_metrics(path)] == [*expected, 100]
  assert path.read_text().splitlines()[: len(expected)] == original[: len(expected)], "the rest is untouched"

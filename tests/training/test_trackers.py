"""Trackers, read back with their own readers."""

import builtins
import os
import sys
import time

import pytest

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.training.config import LoggingConfig
from jaxllm.training.trackers import make_trackers

CONFIG = {"model": {"embed_dim": 8, "layer_pattern": []}, "training": {"steps": 4}}
QUIET = LoggingConfig(tensorboard=False)


def use(config, run, resumed, steps, run_config=CONFIG):
  (tracker,) = make_trackers(config, run, run_config, resumed)
  for step in steps:
    tracker.log(step, {"loss": 1.0 / step, "eval/loss": 2.0})
  tracker.log_text(steps[-1], "sample", "once upon a time")
  tracker.close()


def test_tensorboard_events(tmp_path):
  from tensorboardX.proto.event_pb2 import Event

  use(LoggingConfig(), tmp_path, None, [1, 2, 3])
  use(LoggingConfig(), tmp_path, 2, [3, 4])
  scalars, purged = [], []
  for file in sorted((tmp_path / "tensorboard").iterdir()):
    content = file.read_bytes()
    while content:  # TFRecord: length (8 bytes), its checksum (4), data, its checksum (4)
      length = int.from_bytes(content[:8], "little")
      event = Event.FromString(content[12 : 12 + length])
      content = content[16 + length :]
      if event.HasField("session_log"):
        purged.append(event.step)
      scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.tag == "loss"]
  assert [(s, round(v, 4)) for s, _, v in scalars] == [(1, 1), (2, 0.5), (3, 0.3333), (3, 0.3333), (4, 0.25)]
  assert purged == [3], "readers drop step 3 of the killed run"


def test_tensorboard_on_a_full_disk(tmp_path):
  """The error is that of who logs, at once, and not of a thread that nobody hears."""
  (tracker,) = make_trackers(LoggingConfig(), tmp_path, CONFIG)
  full = os.open("/dev/full", os.O_WRONLY)
  os.dup2(full, tracker._writer._py_recordio_writer._writer.fileno())
  os.close(full)
  for step in range(30):  # more than any queue holds
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/tensorboard: the disk is full"):
      tracker.log(step, {"loss": 1.0})
  tracker.close()


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.split(".")[0] == package:
      raise ImportError(name)
    return real(name, *args, **kwargs)

  for name in [name for name in sys.modules if name.split(".")[0] == package]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ConfigError, match=rf"logging.{package} needs .* pip install 'jaxllm\[trackers\]'"):
    make_trackers(LoggingConfig(tensorboard=False, **{package: True}), tmp_path, CONFIG)


def wandb_history(directory):
  """The run ids and the (step, loss) pairs in W&B's files of offline runs."""
  from wandb.proto import wandb_internal_pb2

  ids, history = set(), []
  for file in sorted((directory / "wandb").glob("offline-run-*/run-*.wandb")):
    content = file.read_bytes()
    assert len(content) < 32768, "one block of the log format (LevelDB's), so no record is split"
    content = content[7:]
    while content:  # checksum (4 bytes), length (2), kind (1), data
      length = int.from_bytes(content[4:6], "little")
      record = wandb_internal_pb2.Record.FromString(content[7 : 7 + length])
      content = content[7 + length :]
      if record.HasField("run"):
        ids.add(record.run.run_id)
      if record.HasField("history"):
        items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
        if "loss" in items:
          history.append((int(items["step"]), round(float(items["loss"]), 4)))
  return ids, sorted(history)


@pytest.mark.slow
def test_wandb_offline(tmp_path):
  pytest.importorskip("wandb")  # in the test extra of Python 3.11 only
  config = LoggingConfig(tensorboard=False, wandb=True, wandb_mode="offline")
  use(config, tmp_path, None, [1, 2, 3])
  use(config, tmp_path, 2, [3, 4])
  wanted = [(1, 1.0), (2, 0.5), (3, 0.3333), (3, 0.3333), (4, 0.25)]
  for _ in range(100):  # its background process may write on after the run is finished
    ids, history = wandb_history(tmp_path)
    if history == wanted:
      break
    time.sleep(0.1)
  assert len(ids) == 1, "a resumed run is the same run"
  assert history == wanted


@pytest.mark.slow
def test_mlflow_in_the_run_directory(tmp_path):
  mlflow = pytest.importorskip("mlflow")  # in the test extra of Python 3.11 only
  config = LoggingConfig(tensorboard=False, mlflow=True)
  use(config, tmp_path, None, [1, 2, 3])
  use(config, tmp_path, 2, [4, 5], {**CONFIG, "training": {"steps": 5}})
  client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
  experiment = client.get_experiment_by_name("jaxllm")
  (run,) = client.search_runs([experiment.experiment_id])  # one run: the resumed run is the same
  assert run.info.status == "FINISHED" and run.data.params["model.embed_dim"] == "8"
  history = client.get_metric_history(run.info.run_id, "loss")
  assert [(m.step, round(m.value, 4)) for m in history] == [
    (1, 1.0),
    (2, 0.5),
    (3, 0.3333),
    (4, 0.25),
    (5, 0.2),
  ]
  assert (next((tmp_path / "mlartifacts").rglob("5.txt"))).read_text() == "once upon a time"
  with pytest.raises(ConfigError, match="logging.mlflow_uri: "):
    make_trackers(LoggingConfig(tensorboard=False, mlflow=True, mlflow_uri=str(tmp_path / "files")), tmp_path, {})

"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow.

A resumed run goes on in the same W&B and MLflow run; their ids are kept in <run>/trackers.json.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxllm.base.errors import ConfigError
from jaxllm.base.files import write_atomically
from jaxllm.base.os_errors import file_errors
from jaxllm.training.config import LoggingConfig


class Tracker(Protocol):
  def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

  def log_text(self, step: int, name: str, text: str) -> None: ...

  def close(self) -> None: ...


def make_trackers(
  config: LoggingConfig, run_directory: Path, run_config: Mapping[str, Any], resumed_step: int | None = None
) -> list[Tracker]:
  """The trackers that the config asks for; none on processes other than the first.

  Raises ConfigError if a package is missing or a service refuses.
  """
  if jax.process_index() != 0:
    return []
  trackers: list[Tracker] = []
  if config.tensorboard:
    trackers.append(TensorBoard(run_directory, resumed_step))
  if config.wandb:
    trackers.append(WandB(config, run_directory, run_config))
  if config.mlflow:
    trackers.append(MLflow(config, run_directory, run_config))
  return trackers


class TensorBoard:
  """Event files in <run>/tensorboard.

  They are written by who logs: the thread of tensorboardX's own writer would end where the disk is full, with a
  traceback, and whoever logs then wait for it for ever.
  """

  def __init__(self, run_directory: Path, resumed_step: int | None = None):
    from tensorboardX import event_file_writer, summary  # imports PyTorch if that is installed
    from tensorboardX.proto import event_pb2

    self._summary, self._protos = summary, event_pb2
    self._place = run_directory / "tensorboard"
    with file_errors(self._place, "cannot write"):
      self._place.mkdir(parents=True, exist_ok=True)
      # tensorboardX names files by the second: a quick restart would overwrite what the first run wrote.
      self._writer = event_file_writer.EventsWriter(str(self._place / "events"), f".{time.time_ns()}")
    if resumed_step is not None:  # hides the points that a killed run had logged beyond its last checkpoint
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._write(resumed_step + 1, [{"file_version": "brain.Event:2"}, {"session_log": start}])

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    self._write(step, [{"summary": self._summary.scalar(name, value)} for name, value in metrics.items()])

  def log_text(self, step: int, name: str, text: str) -> None:
    self._write(step, [{"summary": self._summary.text(name, text)}])

  def _write(self, step: int, events: list[dict[str, Any]]) -> None:
    with file_errors(self._place, "cannot write"):
      for event in events:
        self._writer.write_event(self._protos.Event(step=step, wall_time=time.time(), **event))
      self._writer.flush()

  def close(self) -> None:
    with contextlib.suppress(OSError):  # a full disk, where `log` has failed
      self._writer.close()


class WandB:
  """https://docs.wandb.ai; with mode "offline" the run lies under <run>/wandb until `wandb sync`."""

  def __init__(self, config: LoggingConfig, run_directory: Path, run_config: Mapping[str, Any]):
    try:
      import wandb
    except ImportError as error:
      raise _missing("wandb") from error
    self._wandb = wandb
    run_id = _known_run(run_directory, "wandb")
    try:
      self._run = wandb.init(
        project=config.wandb_project,
        mode=config.wandb_mode,
        dir=str(run_directory),
        name=run_directory.name,
        config=dict(run_config),
        id=run_id,
        resume="allow",
      )
    except wandb.errors.Error as error:
      raise ConfigError(f"logging.wandb: {_first_line(error)}") from error
    _remember_run(run_directory, "wandb", self._run.id)
    # W&B's own step may not go back, ours does after a crash: it is an axis of our own.
    self._run.define_metric("step")
    self._run.define_metric("*", step_metric="step")

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    self._run.log({**metrics, "step": step})

  def log_text(self, step: int, name: str, text: str) -> None:
    self._run.log({name: self._wandb.Table(columns=["text"], data=[[text]]), "step": step})

  def close(self) -> None:
    self._run.finish()


class MLflow:
  """https://mlflow.org; by default a SQLite file and artifacts in the run directory.

  (MLflow 3 refuses its older file store.) `mlflow ui --backend-store-uri sqlite:///<run>/mlflow.db` shows it.
  """

  def __init__(self, config: LoggingConfig, run_directory: Path, run_config: Mapping[str, Any]):
    try:
      from mlflow import MlflowClient
      from mlflow.entities import Metric, Param, RunStatus
      from mlflow.exceptions import MlflowException
    except ImportError as error:
      raise _missing("mlflow") from error
    self._metric = Metric
    self._finished = RunStatus.to_string(RunStatus.FINISHED)
    place = run_directory.absolute()
    try:
      self._client = MlflowClient(tracking_uri=config.mlflow_uri or f"sqlite:///{place / 'mlflow.db'}")
      self._run = _known_run(run_directory, "mlflow")
      if self._run:
        self._client.update_run(self._run, status=RunStatus.to_string(RunStatus.RUNNING))
        return
      experiment = self._client.get_experiment_by_name(config.mlflow_experiment)
      artifacts = None if config.mlflow_uri else (place / "mlartifacts").as_uri()
      experiment_id = (
        experiment.experiment_id if experiment else self._client.create_experiment(config.mlflow_experiment, artifacts)
      )
      self._run = self._client.create_run(experiment_id, run_name=run_directory.name).info.run_id
    except MlflowException as error:
      raise ConfigError(f"logging.mlflow_uri: {_first_line(error)}") from error
    _remember_run(run_directory, "mlflow", self._run)
    params = [Param(name, str(value)[:500]) for name, value in flatten(run_config).items()]
    for start in range(0, len(params), 100):  # the service's limit for one batch
      self._client.log_batch(self._run, params=params[start : start + 100])

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    now = int(time.time() * 1000)
    batch = [self._metric(name, value, now, step) for name, value in metrics.items()]
    self._client.log_batch(self._run, metrics=batch)

  def log_text(self, step: int, name: str, text: str) -> None:
    self._client.log_text(self._run, text, f"{name}/{step}.txt")

  def close(self) -> None:
    self._client.set_terminated(self._run, self._finished)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"model": {"embed_dim": 8}} -> {"model.embed_dim": 8}"""
  flat: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def _missing(package: str) -> ConfigError:
  return ConfigError(f"logging.{package} needs the package {package}: pip install 'jaxllm[trackers]', or switch it off")


def _first_line(error: Exception) -> str:
  return str(error).strip().partition("\n")[0]


def _known_run(run_directory: Path, tracker: str) -> str | None:
  return _known_runs(run_directory / "trackers.json").get(tracker)


def _known_runs(path: Path) -> dict[str, str]:
  if not path.exists():
    return {}
  try:
    known = json.loads(path.read_bytes())
  except ValueError:
    known = None
  if not isinstance(known, dict) or not all(isinstance(name, str) for name in known.values()):
    raise ConfigError(f"{path} is damaged; delete it, and the trackers begin new runs")
  return known


def _remember_run(run_directory: Path, tracker: str, run_id: str) -> None:
  path = run_directory / "trackers.json"
  write_atomically(path, json.dumps({**_known_runs(path), tracker: run_id}))

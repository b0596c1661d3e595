"""The run directory: whose run it is (config.json) and how it went (metrics.jsonl)."""

import fnmatch
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxllm.errors import ConfigError
from jaxllm.parallel import agreement
from jaxllm.training.files import read_metrics, write_atomically
from jaxllm.training.trackers import Tracker, flatten

# What a resumed run may change: how it is watched, where it runs (equal within float tolerance on another
# mesh), and what becomes of bad steps. The number of steps may grow, and the schedule stretches with it.
MAY_CHANGE = (
  "logging.*",
  "checkpoint.*",
  "profile.*",
  "mesh.*",
  "data.workers",
  "data.prefetch",
  "training.eval_*",
  "training.sample_*",
  "compute.remat*",
  "training.on_bad_step",
  "training.spike_sigmas",
)
MAY_GROW = ("training.steps",)


def open_run_directory(path: str | os.PathLike, config: Mapping[str, Any]) -> Path:
  """Creates the run directory, or checks that it is this config's, and writes config.json.

  `config` is the resolved config as nested dicts of JSON values. Raises ConfigError if the directory
  holds a run of another config.
  """
  directory = Path(path)
  file = directory / "config.json"
  if file.exists():
    try:
      saved = json.loads(file.read_text())
    except json.JSONDecodeError:
      raise ConfigError(f"{file} is damaged; restore it, or choose another --workdir") from None
    saved.pop("environment", None)
    try:
      check_same_run(saved, config)
    except ConfigError as error:
      raise ConfigError(f"{directory} holds another run: {error}; choose another --workdir") from None
  if jax.process_index() == 0:
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**config, "environment": environment()}, indent=2) + "\n")
  return directory


def check_same_run(saved: Mapping[str, Any], new: Mapping[str, Any]) -> None:
  """Raises ConfigError naming the first keys in which `new` is not a continuation of `saved`."""
  before, after = (flatten(json.loads(json.dumps(config))) for config in (saved, new))
  different = []
  for key in dict.fromkeys([*before, *after]):
    old, now = before.get(key, "unset"), after.get(key, "unset")
    if old == now or any(fnmatch.fnmatch(key, pattern) for pattern in MAY_CHANGE):
      continue
    if key in MAY_GROW:
      if now < old:
        different.append(f"{key} was {old} and may only grow, not become {now}")
      continue
    different.append(f"{key} was {old!r} and is now {now!r}")
  if different:
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    raise ConfigError(", ".join(different[:3]) + more)


def environment() -> dict[str, Any]:
  """What else a result depends on: versions, commit, host, devices, command."""
  packages = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  devices = jax.devices()
  return {
    "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
    "git_commit": _git_commit(),
    "host": socket.gethostname(),
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "processes": jax.process_count(),
    "command": sys.argv,
  }


class MetricsLogger:
  """Appends lines to metrics.jsonl and passes them to the trackers; only the first process writes.

  `resumed_step` is the checkpoint that the run goes on from (None: from the start). Lines beyond it,
  left by a run that was killed, are dropped, so that no step is there twice. `resumed` is what the lines
  of that step say, on every process.
  """

  def __init__(
    self, run_directory: str | os.PathLike, resumed_step: int | None = None, trackers: Sequence[Tracker] = ()
  ):
    self._directory = Path(run_directory)
    self._trackers = trackers
    self._file = None
    resumed: dict[str, float] = {}
    if jax.process_index() == 0:
      path = self._directory / "metrics.jsonl"
      if path.exists():
        drop_lines_after(path, -1 if resumed_step is None else resumed_step)
        for line in read_metrics(path):
          if line["step"] == resumed_step:
            resumed |= {name: value for name, value in line.items() if name != "step" and value is not None}
      self._file = path.open("a")
    self.resumed: dict[str, float] = agreement.from_first(resumed)

  def __enter__(self) -> "MetricsLogger":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def log(self, step: int, metrics: Mapping[str, Any]) -> None:
    """One line; values are numbers or scalar arrays. NaN and infinity become null: JSON has neither."""
    if self._file is None:
      return
    values = {name: v if isinstance(v, int) else float(v) for name, v in metrics.items()}
    line = {name: v if math.isfinite(v) else None for name, v in values.items()}
    self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
    self._file.flush()
    for tracker in self._trackers:
      tracker.log(step, values)

  def log_text(self, step: int, name: str, text: str) -> None:
    """A sample: a file <run>/samples/<step>-<name>.txt, and the trackers."""
    if self._file is None:
      return
    folder = self._directory / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"{step:08}-{name.replace('/', '-')}.txt").write_text(text)
    for tracker in self._trackers:
      tracker.log_text(step, name, text)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None
      for tracker in self._trackers:
        tracker.close()


def drop_lines_after(path: Path, step: int) -> None:
  kept = [line for line in read_metrics(path) if line["step"] <= step]
  write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git_commit() -> str | None:
  """Of the source tree that this package lies in, with "+" if it has local changes."""

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return None

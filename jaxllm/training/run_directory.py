"""The run directory: one trainer at a time, whose run it is (config.json), the same folder for all hosts."""

import contextlib
import copy
import fnmatch
import importlib.metadata
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxllm.base import digests
from jaxllm.base.errors import ConfigError, DataError
from jaxllm.base.files import local_path, new_directory
from jaxllm.base.locks import hold
from jaxllm.base.os_errors import file_errors
from jaxllm.base.settings import from_mapping, to_mapping
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.interop.directory_files import CHECKPOINTS, CONFIG_FILE, START_FILE, TOKENIZER
from jaxllm.parallel.agreement import first_does, gather
from jaxllm.storage.reading import committed_steps
from jaxllm.training.config import RunConfig, moved
from jaxllm.training.files import METRICS
from jaxllm.training.trackers import flatten

# What a resumed run may change: how it is watched, where it runs and in how many micro-batches (equal within float
# tolerance), when it ends early, and what becomes of bad steps. The number of steps may grow, and the schedule
# stretches with it.
MAY_CHANGE = (
  "logging.*",
  "checkpoint.*",
  "profile.*",
  "mesh.*",
  "data.workers",
  "data.prefetch",
  "training.accumulation",
  "training.early_stopping.*",
  "training.eval_*",
  "training.on_forgetting",
  "training.replay_limit",
  "training.sample_*",
  "compute.remat*",
  "training.on_bad_step",
  "training.spike_sigmas",
)
MAY_GROW = ("training.steps",)

SHARING_PATIENCE_S = 10.0  # for a file of one host to be seen on another
_TOKEN = ".shared-"  # noqa: S105  (the beginning of a file's name)


@contextlib.contextmanager
def hold_run_directory(path: str | os.PathLike) -> Iterator[Path]:
  """Creates the run directory and keeps other trainers out of it while the context lasts; all processes enter it.

  Raises:
    ConfigError: it cannot be created, is a URL, or is not one folder that all processes see.
    UserError: another trainer uses it, and which.
  """
  directory = local_path(path)

  def enter() -> None:
    with file_errors(directory, "cannot create the run directory", ConfigError):
      directory.mkdir(parents=True, exist_ok=True)
    stack.enter_context(hold(directory))

  with contextlib.ExitStack() as stack:
    first_does(enter)
    _check_shared(directory)
    yield directory


def _check_shared(directory: Path) -> None:
  """That all processes see what the first one writes."""
  if jax.process_count() == 1:
    return

  def write() -> str:
    for old in directory.glob(f"{_TOKEN}*"):
      old.unlink()
    # A name that no host has looked for before: a network file system remembers what was not there.
    token = directory / (_TOKEN + secrets.token_hex(8))
    token.touch()
    return token.name

  name = first_does(write)
  hosts = gather([socket.gethostname(), str(directory.absolute()), _appears(directory / name)])
  if jax.process_index() == 0:
    (directory / name).unlink()
  host, place, _ = hosts[0]
  if blind := [f"process {i} on host {other}" for i, (other, _, seen) in enumerate(hosts) if not seen]:
    more = f" and {len(blind) - 3} more" if len(blind) > 3 else ""
    raise ConfigError(
      f"{place} is not one folder for all hosts: what process 0 on host {host} writes is not seen by "
      f"{', '.join(blind[:3])}{more}; choose a --workdir on a file system that they share"
    )
  for index, (other, elsewhere, _) in enumerate(hosts):
    if elsewhere != place:
      raise ConfigError(
        f"the run directory is {place} for process 0 on host {host} and {elsewhere} for process {index} on host "
        f"{other}; give all of them the same --workdir and working directory"
      )


def _appears(path: Path) -> bool:
  deadline = time.monotonic() + SHARING_PATIENCE_S
  while not path.exists():
    if time.monotonic() > deadline:
      return False
    time.sleep(0.1)
  return True


def open_run_directory(path: str | os.PathLike, config: Mapping[str, Any], tokenizer: Tokenizer | None = None) -> Path:
  """Checks that the run directory is this config's, or begins it, and writes config.json; all processes call it.

  What a run was begun with is checked against the run's manifest, see `jaxllm.base.digests`.

  Args:
    config: resolved, as nested dicts of JSON values.
    tokenizer: of the data, which stays with the run.

  Raises:
    ConfigError: the directory holds a run of another config, or is a URL.
    CheckpointError: a file of the run is damaged, or the system refuses.
  """
  directory = local_path(path)
  file = directory / CONFIG_FILE

  def check_and_write() -> None:
    with file_errors(directory, "cannot read or write"):
      begun = file.exists() or bool(committed_steps(directory / CHECKPOINTS))
      if begun:
        digests.check(directory)
        try:
          saved = json.loads(file.read_bytes())
          saved.pop("environment", None)
          check_same_run(_of_today(saved), _of_today(config))
        except (ValueError, AttributeError):
          raise ConfigError(f"{file} is damaged; restore it, or choose another --workdir") from None
        except ConfigError as error:
          raise ConfigError(f"{directory} holds another run: {error}; choose another --workdir") from None
      directory.mkdir(parents=True, exist_ok=True)
      beside: list[str] = []
      if not begun and (directory / METRICS).exists():  # it is begun after config.json
        raise ConfigError(
          f"{directory} has a {METRICS} and no {CONFIG_FILE}: choose another --workdir, or move it away"
        )
      if not begun:  # what a run that was killed before it began has left is of no use
        (directory / digests.NAME).unlink(missing_ok=True)
        (directory / START_FILE).unlink(missing_ok=True)
      elif not (directory / digests.NAME).exists() and (directory / START_FILE).exists():
        beside.append(START_FILE)
      if tokenizer is not None:
        place = directory / TOKENIZER
        if not begun or not place.is_dir():
          with new_directory(place, lambda old: _is_as(old, tokenizer)) as new:
            tokenizer.save(new)
        beside += [f"{TOKENIZER}/{name}" for name in digests.files_in(place)]
      content = json.dumps({**config, "environment": environment()}, indent=2) + "\n"
      digests.record(directory, {CONFIG_FILE: content.encode()}, beside)

  first_does(check_and_write)
  return directory


def _is_as(directory: Path, tokenizer: Tokenizer) -> bool:
  """Whether a directory holds that tokenizer, which a run has left that was killed before it began; and nothing of
  somebody else's."""
  try:
    return load_tokenizer(directory).fingerprint == tokenizer.fingerprint
  except DataError:
    return False


def _of_today(saved: Mapping[str, Any]) -> Mapping[str, Any]:
  """A saved config with its keys at their places of today, and the defaults of those that it did not have."""
  with contextlib.suppress(ConfigError):  # of another version altogether: it is compared as it stands
    return to_mapping(from_mapping(RunConfig, moved(copy.deepcopy(dict(saved)))))
  return saved


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


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git_commit() -> str | None:
  """Of the source tree that this package lies in, with "+" if it has local changes."""

  def git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603  (our words alone)
    return done.stdout.strip()

  try:
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return None

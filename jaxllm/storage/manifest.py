"""The manifest of a checkpoint step: what was saved, and the SHA-256 of every file it was saved in.

`manifest.json` is written last and renamed into place, so its presence is what commits a step. Orbax and
TensorStore return flipped bits as if they were weights; the hashes are what notices. Every process hashes
what it wrote itself: of 8B parameters and their moments, 44 s for one host.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.base.files import write_atomically

NAME = "manifest.json"


class DamagedError(Exception):
  """A file of a step is missing, cut short or changed; the message names it."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  step: int
  metrics: dict[str, float | None]
  tree: dict[str, dict[str, Any]]  # leaf path -> {"shape", "dtype", and "impl" of a random key}
  files: dict[str, dict[str, Any]]  # path relative to the step -> {"bytes", "sha256"}


def write(directory: Path, step: int, metrics: Mapping[str, float], tree: dict, files: Mapping[str, dict]) -> None:
  """Commits the step: `files` are the digests of all that lies in its `directory`."""
  finite = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
  body = dataclasses.asdict(Manifest(step, finite, tree, dict(sorted(files.items()))))
  write_atomically(directory / NAME, json.dumps({**body, "sha256": _own_digest(body)}, indent=1))


def files_of(directory: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
  """The files under `directory` that were written by process i of n, with share (i, n).

  Orbax keeps each process's arrays apart. What bears no process's name is the first one's.
  """
  index, count = share
  names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())

  def writer(name: str) -> int:
    found = re.search(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)", name)
    return int(found[1]) if found and int(found[1]) < count else 0

  return [name for name in names if writer(name) == index]


def digests(directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Size and SHA-256 of the named files; raises OSError."""
  hashes = _in_threads(lambda name: _sha256(directory / name), names)
  return {name: {"bytes": (directory / name).stat().st_size, "sha256": hash} for name, hash in zip(names, hashes)}


def read(directory: Path) -> Manifest:
  """Raises DamagedError if the manifest is not what was written."""
  try:
    body = json.loads((directory / NAME).read_text())
    if body.pop("sha256") != _own_digest(body):
      raise DamagedError(f"{directory / NAME} has changed since it was written")
    return Manifest(**body)
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise DamagedError(f"{directory / NAME} cannot be read") from error


def verify(directory: Path, manifest: Manifest, wanted: Callable[[str], bool], share: tuple[int, int] = (0, 1)) -> None:
  """Reads and hashes the `wanted` files; of n processes, process i with share (i, n) takes every n-th.

  Raises DamagedError for the first file that is missing, has another size, or another hash.
  """
  index, count = share
  names = [name for name in manifest.files if wanted(name)][index::count]
  for name in names:  # the cheap check first: a missing file is found before gigabytes are hashed
    path = directory / name
    expected = manifest.files[name]["bytes"]
    if not path.is_file():
      raise DamagedError(f"{path} is missing")
    if path.stat().st_size != expected:
      raise DamagedError(f"{path} has {path.stat().st_size} bytes instead of {expected}")

  def check(name: str) -> None:
    try:
      digest = _sha256(directory / name)
    except OSError as error:
      raise DamagedError(f"{directory / name} cannot be read ({error.strerror})") from error
    if digest != manifest.files[name]["sha256"]:
      raise DamagedError(f"{directory / name} has changed since it was written")

  _in_threads(check, names)


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(body: dict) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _in_threads(function: Callable[[str], Any], names: Sequence[str]) -> list:
  # hashlib lets go of the interpreter lock, so threads add up: about 1.1 GB/s each with SHA instructions.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(function, names))

"""The manifest of a checkpoint step: what was saved, and the SHA-256 of every file it was saved in.

`manifest.json` is written last and renamed into place, so its presence is what commits a step. Orbax and
TensorStore return flipped bits as if they were weights; the hashes are what notices. Every process hashes
what it wrote itself: of 8B parameters and their moments, 44 s for one host.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxllm.base import digests as base
from jaxllm.base.digests import DamagedError, digests

__all__ = ["DamagedError", "Manifest", "digests", "files_of", "read", "verify", "write"]

NAME = "manifest.json"


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
  base.write_signed(directory / NAME, body)


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


def read(directory: Path) -> Manifest:
  """The manifest of a step, which lies in the directory of its name.

  Raises:
    DamagedError: it is not what was written, or of another step (the directory was copied or renamed).
    CheckpointError: it cannot be read.
  """
  try:
    body = base.read_signed(directory / NAME)
    manifest = Manifest(**body | {"files": base.files_of(body, directory / NAME)})
  except TypeError as error:
    raise DamagedError(f"{directory / NAME} is of another version of jaxllm") from error
  if str(manifest.step) != directory.name:
    raise DamagedError(f"{directory} is a copy of step {manifest.step} under another name")
  return manifest


def verify(directory: Path, manifest: Manifest, wanted: Callable[[str], bool], share: tuple[int, int] = (0, 1)) -> None:
  """Reads and hashes the `wanted` files; of n processes, process i with share (i, n) takes every n-th.

  Raises DamagedError for the first file that is missing, has another size, or another hash, and CheckpointError for
  one that cannot be read.
  """
  index, count = share
  base.verify(directory, manifest.files, [name for name in manifest.files if wanted(name)][index::count])

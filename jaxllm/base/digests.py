"""The SHA-256 of files: directories that say of themselves what was written into them, and are checked before use.

`jaxllm_manifest.json` of a model's, a run's or an adapter's directory has the size and SHA-256 of each file beside it,
and its own digest. It is written last. The manifests of checkpoints (`jaxllm.storage.manifest`) stand on the same
functions. A file that cannot be read for another reason than that it is not there is never called damaged.

What a manifest that was deleted means: the directory is used as it stands, with a warning. It may have been written
before there were manifests, or its owner has edited a file and says so by deleting the manifest; nothing else would
let one do that. What nobody meant to change is still met with more than silence.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from jaxllm.base.errors import CheckpointError
from jaxllm.base.files import regular, write_atomically
from jaxllm.base.os_errors import MISSING, file_errors, number_of

NAME = "jaxllm_manifest.json"

log = logging.getLogger("jaxllm")
_said: set[Path] = set()


class DamagedError(Exception):
  """A file is missing, cut short or changed; the message names it."""


class Digest(TypedDict):
  """Of a file."""

  bytes: int
  sha256: str


def digest_of(content: bytes) -> Digest:
  return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def digests(directory: Path, names: Sequence[str]) -> dict[str, Digest]:
  """Size and SHA-256 of the named files; raises OSError."""
  hashes = _in_threads(lambda name: _sha256(directory / name), names)
  return {name: {"bytes": (directory / name).stat().st_size, "sha256": hash} for name, hash in zip(names, hashes)}


def files_in(directory: Path) -> list[str]:
  """The files under a directory, but for its manifest."""
  names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
  return [name for name in names if name != NAME]


def verify(directory: Path, files: Mapping[str, Mapping[str, Any]], names: Iterable[str] | None = None) -> None:
  """Reads and hashes the named files, or all.

  Raises:
    DamagedError: names the first that is missing, has another size, or another hash.
    CheckpointError: one cannot be read.
  """
  names = list(files if names is None else names)
  for name in names:  # the cheap check first: a missing file is found before gigabytes are hashed
    path, expected = directory / name, files[name]["bytes"]
    with file_errors(path):
      if not path.is_file():
        raise DamagedError(f"{path} is missing")
      size = path.stat().st_size
    if size != expected:
      raise DamagedError(f"{path} has {size} bytes instead of {expected}")

  def check(name: str) -> None:
    with file_errors(directory / name):
      hash = _sha256(directory / name)
    if hash != files[name]["sha256"]:
      raise DamagedError(f"{directory / name} has changed since it was written")

  _in_threads(check, names)


def write_signed(path: Path, body: Mapping[str, Any]) -> None:
  """Writes an object with its own digest. Raises CheckpointError."""
  write_atomically(path, json.dumps({**body, "sha256": _own_digest(body)}, indent=1))


def read_signed(path: Path) -> dict[str, Any]:
  """What `write_signed` wrote.

  Raises:
    DamagedError: it is missing, or something else. CheckpointError: it cannot be read.
  """
  try:
    with file_errors(path):
      text = regular(path).read_bytes()
    body = json.loads(text)
    signed = body.pop("sha256")
    # The digest is of what the text means; a text that means the same and reads otherwise was changed too.
    if signed != _own_digest(body) or text.decode() != json.dumps({**body, "sha256": signed}, indent=1):
      raise DamagedError(f"{path} has changed since it was written")
    return body
  except CheckpointError as error:
    if number_of(error) in MISSING:
      raise DamagedError(f"{path} is missing") from error
    raise
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise DamagedError(f"{path} has changed since it was written") from error


def files_of(body: Mapping[str, Any], place: Path) -> dict[str, dict[str, Any]]:
  """The files that a manifest names. Its signature says that it is whole, not that it is sane: anyone can sign.

  Raises:
    DamagedError: it is no table of files under its directory with their digests.
  """
  files = body.get("files")
  if isinstance(files, dict) and all(_is_file(name) and _is_digest(each) for name, each in files.items()):
    return files
  raise DamagedError(f"{place} was not written by jaxllm")


def _is_file(name: str) -> bool:
  path = PurePosixPath(name)
  return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _is_digest(value: Any) -> bool:
  if not isinstance(value, dict) or type(value.get("bytes")) is not int or type(value.get("sha256")) is not str:
    return False
  return value.get("was") is None or _is_digest(value["was"])


def seal(directory: Path) -> None:
  """Writes the manifest of all that lies in a directory; raises OSError or CheckpointError."""
  write_signed(directory / NAME, {"files": digests(directory, files_in(directory))})


def record(directory: Path, contents: Mapping[str, bytes], beside: Iterable[str] = ()) -> None:
  """Writes files of a directory whose others may be used meanwhile, and their digests into its manifest.

  A program that is killed in the middle leaves each file whole, the new one or the one before, and the manifest
  allows either until the next `record`.

  Args:
    beside: files that are there already and join the manifest as they are.

  Raises:
    CheckpointError: the system refuses.
  """
  with file_errors(directory, "cannot write"):
    place = directory / NAME
    before = files_of(read_signed(place), place) if place.exists() else {}
    after = before | digests(directory, sorted(beside)) | {name: digest_of(data) for name, data in contents.items()}
    between = {
      name: digest | {"was": before.get(name)} if name in contents else digest for name, digest in after.items()
    }
    write_signed(place, {"files": between})
    for name, data in contents.items():
      write_atomically(directory / name, data)
    write_signed(
      place, {"files": {name: {k: v for k, v in each.items() if k != "was"} for name, each in after.items()}}
    )


def check(directory: Path, read_if_there: Sequence[str] = (), quiet: bool = False) -> bool:
  """Checks a directory's files against its manifest; a warning, once, where there is none.

  Args:
    read_if_there: patterns of files that would be read if they were there, so that one the manifest lacks is refused.
    quiet: others write such directories too, so no manifest is no news.

  Returns:
    Whether there is a manifest.

  Raises:
    CheckpointError: a file is missing, has changed, or has come; or cannot be read.
  """
  place = directory / NAME
  if not os.path.lexists(place):
    if not quiet and directory.absolute() not in _said:
      _said.add(directory.absolute())
      log.warning("%s has no %s, so nobody knows whether its files are those that were written", directory, NAME)
    return False
  try:
    files = files_of(read_signed(place), place)
    settled = {name: each for name, each in files.items() if "was" not in each}
    verify(directory, settled)
    for name in files.keys() - settled.keys():  # a program was killed while it replaced this one
      _verify_either(directory, name, files[name], files[name]["was"])
    for path in (path for pattern in read_if_there for path in directory.glob(pattern)):
      if path.relative_to(directory).as_posix() not in files:
        raise DamagedError(f"{path} was not there when {directory} was written")
  except DamagedError as error:
    raise CheckpointError(
      f"{error}; put back what was there, or, if the change was meant, delete {place}: the files are then used "
      "as they are, with a warning"
    ) from error
  return True


def _verify_either(directory: Path, name: str, new: Mapping[str, Any], old: Mapping[str, Any] | None) -> None:
  if old is None and not (directory / name).exists():
    return
  try:
    verify(directory, {name: new})
  except DamagedError:
    if old is None:
      raise
    verify(directory, {name: old})


def _sha256(path: Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(body: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _in_threads(function: Callable[[str], Any], names: Sequence[str]) -> list:
  # hashlib lets go of the interpreter lock, so threads add up: about 1.1 GB/s each with SHA instructions.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(function, names))

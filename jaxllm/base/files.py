"""Files and directories that are there whole or not at all, and paths that are no files."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxllm.base.errors import CheckpointError, ConfigError


def local_path(path: str | os.PathLike) -> Path:
  """A path of this machine, "~" resolved.

  Raises ConfigError for a URL such as gs://bucket/run, which would else become the folder "gs:" (and has, as a Path,
  lost one of its slashes).
  """
  text = os.fspath(path)
  if text.startswith("file:"):
    raise ConfigError(f"{text} is a URL; leave out the file:// before the path")
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
    raise ConfigError(
      f"{re.sub(':/+', '://', text, count=1)} is a URL, and object stores cannot be read or written yet; "
      "mount it, or take a path on a disk"
    )
  return Path(text).expanduser()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
  """A file to fill, which takes the place of `path` on leaving the context without an error, else goes.

  It is written beside `path`, flushed to the disk, then renamed.
  """
  temporary = path.with_name(path.name + ".tmp")
  try:
    with temporary.open("wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
  _flush(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
  """Replaces the file or leaves the old one."""
  with new_file(path) as file:
    file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_directory(path: Path, may_replace: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
  """A directory to fill, which becomes `path` on leaving the context without an error.

  It is filled under a hidden name beside its own, so what a killed program leaves behind is found under no name
  that anyone asked for.

  Args:
    may_replace: whether this directory, which is not empty, may be replaced.

  Raises:
    ConfigError: `path` is a URL.
    CheckpointError: `path` is a file, or a directory that may not be replaced; or an OSError in the
      context (the disk is full, say), in which case nothing is left of it.
  """
  path = local_path(path)
  if path.exists() and not path.is_dir():
    raise CheckpointError(f"cannot write {path}: it is a file")
  full = path.is_dir() and any(path.iterdir())
  if full and not may_replace(path):
    raise CheckpointError(f"{path} has other things in it; choose an empty or new directory")
  new, old = _beside(path, "partial"), _beside(path, "replaced")
  try:
    new.parent.mkdir(parents=True, exist_ok=True)
    _remove(new)
    new.mkdir()
    yield new
    if full:
      _remove(old)
      path.rename(old)
    new.rename(path)
    _flush(new.parent)
    _remove(old)
  except BaseException as error:
    shutil.rmtree(new, ignore_errors=True)
    if isinstance(error, OSError):
      full = error.errno in (errno.ENOSPC, errno.EDQUOT)
      what = "the disk is full" if full else error.strerror or str(error)
      raise CheckpointError(f"cannot write {path}: {what}; nothing of it is left") from error
    raise


def _beside(path: Path, state: str) -> Path:
  return path.absolute().with_name(f".{path.absolute().name}.{state}")


def _remove(path: Path) -> None:
  if path.exists():
    shutil.rmtree(path)


def _flush(directory: Path) -> None:
  """Brings the renames in a directory to the disk."""
  handle = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)

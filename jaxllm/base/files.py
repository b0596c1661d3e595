"""Files and directories that are there whole or not at all, and paths that are no files."""

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.os_errors import file_errors

_SCRATCH = "jaxllm-scratch-"
_YOUNG_S = 60.0  # between the making of a scratch directory and its lock


def local_path(path: str | os.PathLike) -> Path:
  """A path of this machine, "~" resolved.

  Raises ConfigError for nothing at all, which would else be the current folder, and for a URL such as
  gs://bucket/run, which would become the folder "gs:" (and has, as a Path, lost one of its slashes).
  """
  text = os.fspath(path)
  if not text.strip() or "\0" in text:
    raise ConfigError(f"{text!r} is no path; name a file or folder")
  if re.search("[\ud800-\udfff]", text):
    raise ConfigError(f"{text} is not in UTF-8, which the libraries that write files ask of a name; rename it")
  if text.startswith("file:"):
    raise ConfigError(f"{text} is a URL; leave out the file:// before the path")
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
    raise ConfigError(
      f"{re.sub(':/+', '://', text, count=1)} is a URL, and object stores cannot be read or written yet; "
      "mount it, or take a path on a disk"
    )
  try:
    return Path(text).expanduser()
  except RuntimeError as error:  # ~ of a user who is not known, or without HOME
    raise ConfigError(f"{text} begins with the home of a user whom this machine does not know; write it out") from error


def regular(path: Path) -> Path:
  """The path of a file that ends: reading a pipe or a device, which a stranger may have put there, need not.

  Raises:
    OSError: it is none, or there is none.
  """
  mode = path.stat().st_mode
  if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder the system says it itself
    raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE), str(path))
  return path


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
  """A file to fill, which takes the place of `path` on leaving the context without an error, else goes.

  It is written beside `path`, flushed to the disk, then renamed.

  Raises:
    CheckpointError: the system refuses (the disk is full, say); nothing is left of it.
  """
  temporary = path.with_name(path.name + ".tmp")
  with file_errors(path, "cannot write"):
    try:
      with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
      temporary.replace(path)
    finally:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
    _flush(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
  """Replaces the file or leaves the old one. Raises CheckpointError as `new_file`."""
  with new_file(path) as file:
    file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_directory(path: Path, may_replace: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
  """A directory to fill, which becomes `path` on leaving the context without an error.

  It is filled under a hidden name beside its own, so what a killed program leaves behind is found under no name
  that anyone asked for, and the next one to write there removes it. The new one and one that it replaces change places
  in one step of the kernel's, where its file system can, else see `recover`: at no moment is there none.

  Args:
    may_replace: whether this directory, which is not empty, may be replaced.

  Raises:
    ConfigError: `path` is a URL.
    CheckpointError: `path` is a file, or a directory that may not be replaced; or the system refuses (the disk is
      full, say), in which case nothing is left of it.
  """
  path = local_path(path)
  recover(path)
  with file_errors(path, "cannot write"):
    if path.exists() and not path.is_dir():
      raise CheckpointError(f"cannot write {path}: it is a file; choose another name, or move it away")
    full = path.is_dir() and any(path.iterdir())
    if full and not may_replace(path):
      raise CheckpointError(f"{path} has other things in it; choose an empty or new directory")
    new, old = _beside(path, "partial"), _beside(path, "replaced")
    try:
      with contextlib.suppress(FileExistsError):  # a file stands where a folder should: mkdir says it better
        new.parent.mkdir(parents=True, exist_ok=True)
      _remove(new)
      new.mkdir()
      yield new
      _flush_tree(new)
      if not full:
        new.rename(path)
      elif not _exchange(new, path):
        _remove(old)
        path.rename(old)
        new.rename(path)
      _flush(new.parent)
      _remove(old)
    finally:
      shutil.rmtree(new, ignore_errors=True)  # the old one, where they changed places


def recover(path: Path) -> None:
  """Puts back the directory that a program was replacing when it was killed between two renames.

  Only where the file system cannot exchange two names; whoever reads or writes a directory calls this first.
  """
  old = _beside(path, "replaced")
  if old.is_dir() and not os.path.lexists(path):
    with file_errors(path, "cannot put back"):
      old.rename(path)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
  """A directory in the system's folder of temporary files that goes with the context, or, where this process is
  killed, when the next one wants such a directory."""
  folder = temporary_folder()
  _remove_abandoned(folder)
  with file_errors(folder, "cannot write"), tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as name:
    lock = os.open(name, os.O_RDONLY)
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield Path(name)
    finally:
      os.close(lock)


def temporary_folder() -> Path:
  """The system's folder of temporary files.

  Raises:
    CheckpointError: there is none that can be written.
  """
  try:
    return Path(tempfile.gettempdir())
  except OSError as error:
    raise CheckpointError(
      "no folder of temporary files can be written; free some space in /tmp, or set TMPDIR to another folder"
    ) from error


def _remove_abandoned(folder: Path) -> None:
  """Removes this user's scratch directories that no living process holds; a young one may be about to be held."""
  for place in folder.glob(f"{_SCRATCH}*"):
    with contextlib.suppress(OSError):
      facts = place.lstat()
      if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode) or time.time() - facts.st_mtime < _YOUNG_S:
        continue
      handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW)
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(place, ignore_errors=True)
      finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
  """Exchanges two names, renameat2(2); False where kernel, C library or file system cannot."""
  try:
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
  except (OSError, AttributeError):
    return False
  here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
  if renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
    return True
  number = ctypes.get_errno()
  if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
    return False
  raise OSError(number, os.strerror(number), str(other))


def _beside(path: Path, state: str) -> Path:
  return path.absolute().with_name(f".{path.absolute().name}.{state}")


def _remove(path: Path) -> None:
  if path.exists():
    shutil.rmtree(path)


def _flush_tree(directory: Path) -> None:
  """Brings a directory's files to the disk: a name must not outlive a power cut that its content does not."""
  for folder, _, names in os.walk(directory):
    for name in names:
      _flush(Path(folder) / name)
    _flush(Path(folder))


def _flush(path: Path) -> None:
  """Brings a file, or the renames in a directory, to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)

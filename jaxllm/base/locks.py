"""A directory that one program at a time may use: a lock that says who holds it and that no crash leaves behind.

The lock is the kernel's, on the file `<directory>/lock` (POSIX record locks: fcntl(2)). It ends with the process that
took it, whatever ended it, kill -9 and a power cut included; children do not have it, so orphaned workers keep nobody
out. The file's text is for people. It stays there, empty, because a file that is removed can be locked twice.

Who only reads a directory for long may say so with `share`; who wants to remove it asks `is_shared`.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from jaxllm.base.errors import UserError
from jaxllm.base.os_errors import file_errors

NAME = "lock"
_LONGEST = 500  # bytes of the file that a message repeats
_INTERVAL_S = 0.1

log = logging.getLogger("jaxllm")
# Paths that this process holds. The kernel would give it a lock twice, and take both when one of the files is closed.
_held: dict[str, int] = {}
_shared: dict[str, int] = {}  # files that this process uses, by their path
_guard = threading.Lock()


@contextlib.contextmanager
def hold(directory: Path, patience_s: float = 1.0) -> Iterator[None]:
  """Keeps other programs out of the directory, which exists, while the context lasts.

  Where the file system has no locks this says so in a warning and holds nothing.

  Args:
    patience_s: how long to wait for who holds it now (math.inf: for ever). A second is for one that is just dying.

  Raises:
    UserError: another program uses the directory, and which; or the lock file cannot be written.
  """
  path = directory / NAME
  key = os.path.realpath(path)
  with _guard:
    if _held.get(key) == os.getpid():  # not opened even to read it: closing it would give up the lock
      raise UserError(f"{directory} is in use by this process already")
    _held[key] = os.getpid()
  try:
    with file_errors(path, "cannot write", UserError):
      # Python closes it in programs that this one starts; children by fork do not inherit such a lock.
      file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
      locked = _acquire(file, directory, patience_s)
      _write(file, _myself())
      try:
        yield
      finally:
        if locked:
          _write(file, "")
    finally:
      os.close(file)
  finally:
    with _guard:
      _held.pop(key, None)


def _acquire(file: int, directory: Path, patience_s: float) -> bool:
  """Takes the lock; False where there are no locks."""
  deadline, said = time.monotonic() + patience_s, False
  while True:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except OSError as error:
      if error.errno not in (errno.EACCES, errno.EAGAIN):
        before = _text(file)
        log.warning(
          "the file system of %s has no locks (%s), so nothing keeps a second program out of it%s",
          directory,
          error.strerror,
          f"; the last to use it was {before}" if before else "",
        )
        return False
    if time.monotonic() >= deadline:
      raise UserError(f"{directory} is in use by {_text(file) or 'another program'}")
    if not said and patience_s > 1:
      said = True
      log.info("waiting for %s, which is in use by %s", directory, _text(file) or "another program")
    time.sleep(_INTERVAL_S)


def _myself() -> str:
  since = time.strftime("%Y-%m-%d %H:%M:%S %z")
  return f"pid {os.getpid()} on host {socket.gethostname()} since {since}: {shlex.join(sys.orig_argv)}"


def _text(file: int) -> str:
  """Who the file says holds it, in one line."""
  text = os.pread(file, _LONGEST, 0).decode(errors="replace").split("\n")[0]
  return text if len(text) <= 200 else text[:200] + "…"


def _write(file: int, text: str) -> None:
  with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
    os.ftruncate(file, 0)
    os.pwrite(file, (text + "\n" if text else "").encode(errors="replace"), 0)


def share(path: Path) -> None:
  """Says to other programs, until this one ends, that it uses what a file stands for, or lies in; nothing where there
  is no such file, or its file system has no locks."""
  key = os.path.realpath(path)
  with _guard, contextlib.suppress(OSError):
    if key not in _shared:
      file = os.open(path, os.O_RDONLY)
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
      except OSError:
        os.close(file)
        raise
      _shared[key] = file


def is_shared(path: Path) -> bool:
  """Whether another program has said so and still runs. This one, which asks, then says so no more."""
  with _guard, contextlib.suppress(OSError):
    if (own := _shared.pop(os.path.realpath(path), None)) is not None:
      os.close(own)
    file = os.open(path, os.O_RDWR)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return True
    finally:
      os.close(file)
  return False

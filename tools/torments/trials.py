"""One trial: a function or a door in a child process, which may hang, crash or take all memory, and what came of it.

Children are forked from a process that has imported the package and started nothing (`multiprocessing`'s forkserver),
so a trial costs a fraction of a second and not an import.
"""

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HANG_S = 60.0  # a trial of a tiny model takes a second or two; on a busy machine ten times that
MEMORY_BYTES = 4 << 30
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["jaxllm.training.loop", "jaxllm.inference.load", "jaxllm.cli", "torments.readings"])


class Limits(NamedTuple):
  """What a child may have; None: as much as there is."""

  open_files: int | None = None
  file_bytes: int | None = None  # of one file that it writes
  memory_bytes: int | None = None  # of private memory
  modest: bool = False  # root gives up its right to open what is closed to it
  stdout: str | None = None  # a file in place of what is read here


class Outcome(NamedTuple):
  code: int | None  # as the shell has it, negative where a signal ended it; None: it hung and was killed
  out: str
  err: str
  seconds: float
  peak_bytes: int

  @property
  def verdict(self) -> str:
    """ "done", "refused" (one line, exit code 2), "stopped" (one line, exit code 130), or what is wrong with it."""
    lines = [line for line in self.err.splitlines() if line.strip()]
    if self.code is None:
      return "hang"
    if self.peak_bytes > MEMORY_BYTES:
      return "memory"
    if "Traceback (most recent call last)" in self.err:
      return "traceback"
    if self.code < 0:
      return f"crash: {signal.Signals(-self.code).name}"
    if self.code == 0:
      return "done"
    errors = [line for line in lines if line.startswith("error: ")]
    if self.code == 2 and len(errors) == 1 and len(errors[0]) <= 600 and lines[-1] == errors[0]:
      return "refused"
    if self.code == 130 and lines and lines[-1] == "stopped":
      return "stopped"
    return f"exit code {self.code}"


def trial(function: Callable, *args: Any, limits: Limits = Limits(), timeout_s: float = HANG_S) -> Outcome:
  """Calls a module's function in a child; its result, where it is a number, is the exit code."""
  with tempfile.TemporaryDirectory(prefix="torture-") as folder:
    out, err = Path(folder, "out"), Path(folder, "err")
    started = time.monotonic()
    child = _CONTEXT.Process(target=_enter, args=(function, args, limits, str(out), str(err), os.getcwd()))
    child.start()
    peak = _watch(child, started + timeout_s)
    code = child.exitcode
    if code is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
      child.join()
    said = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    return Outcome(code, *said, time.monotonic() - started, peak)


def door(name: str, *argv: Any, limits: Limits = Limits(), timeout_s: float = HANG_S) -> Outcome:
  """Runs a door, as `python -m jaxllm.NAME ARGV` would."""
  return trial(_run_door, name, [str(word) for word in argv], limits=limits, timeout_s=timeout_s)


def _run_door(name: str, argv: Sequence[str]) -> int:
  from jaxllm.cli import check_limits, run_door

  sys.unraisablehook = lambda raised: None  # as a door has it that is a program of its own
  check_limits()
  return run_door(importlib.import_module(f"jaxllm.{name}").main, argv)


def _watch(child: Any, deadline: float) -> int:
  """Waits until the child ends or the deadline is over; the most memory that it was seen to have, in bytes."""
  peak = 0
  while child.exitcode is None and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
      peak = max(peak, int(found[1]) * 1024 if found else 0)
    child.join(0.05)
  return peak


def _give_up_rights() -> None:
  """Takes CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH from this process, capset(2)."""
  libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
  sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of capabilities 0 to 31 and then of the others
  if libc.capget(header, sets) == 0:
    for index in range(3):
      sets[index] &= ~0b110
    libc.capset(header, sets)


def _enter(function: Callable, args: Sequence[Any], limits: Limits, out: str, err: str, folder: str) -> None:
  """The child's side: its own process group, output into files, the limits; then the function."""
  os.setpgid(0, 0)
  os.chdir(folder)
  for path, number in ((limits.stdout or out, 1), (err, 2)):
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(handle, number)
    os.close(handle)
  sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  for kind, most in (
    (resource.RLIMIT_NOFILE, limits.open_files),
    (resource.RLIMIT_FSIZE, limits.file_bytes),
    (resource.RLIMIT_DATA, limits.memory_bytes),
  ):
    if most is not None:
      resource.setrlimit(kind, (most, most))
  if limits.modest:
    _give_up_rights()
  result = function(*args)
  with contextlib.suppress(OSError, ValueError):
    sys.stdout.flush()
  sys.exit(result if isinstance(result, int) else 0)

"""Work in a child process that may crash, hang or run out of memory without taking the rest along.

A child starts once and answers job after job, so that its start-up counts once. When it dies, or does not answer in
time and is killed, the caller gets `Lost` with a reason, and the next job starts a new child.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ANSWERS = "JAXLLM_ANSWERS_FD"  # standard output belongs to whatever the libraries print


class Lost(Exception):
  """The child died or was killed while it worked; the message says how."""


class Child:
  """A process that runs `command` and answers JSON with JSON, one line each."""

  def __init__(self, command: list[str], *, start_timeout: float = 180, env: dict[str, str] | None = None):
    self.command, self.start_timeout = command, start_timeout
    self.env = dict(os.environ) if env is None else env
    self.process: subprocess.Popen | None = None
    self.jobs = 0  # answered by this process

  def ask(self, job: dict, timeout: float) -> dict:
    """The answer to a job. Raises Lost, also where the child does not start."""
    if self.process is None:
      self._start()
    try:
      self.process.stdin.write(json.dumps(job).encode() + b"\n")
      self.process.stdin.flush()
    except OSError:
      raise Lost(self._end("the process had ended")) from None
    answer = self._read(timeout, f"no answer in {timeout:.0f} s, killed")
    self.jobs += 1
    return answer

  def close(self) -> None:
    """Ends the process, if there is one."""
    if self.process is not None:
      self._end("")

  def _start(self):
    reading, writing = os.pipe()
    self.said = tempfile.TemporaryFile()  # noqa: SIM115
    self.process = subprocess.Popen(
      self.command,
      stdin=subprocess.PIPE,
      stdout=self.said,
      stderr=subprocess.STDOUT,
      env=self.env | {ANSWERS: str(writing)},
      pass_fds=(writing,),
      start_new_session=True,  # so that its compilers are killed with it
    )
    os.close(writing)
    self.answers, self.jobs, self.rest = reading, 0, b""
    self._read(self.start_timeout, f"did not start in {self.start_timeout:.0f} s, killed")

  def _read(self, timeout, late):
    deadline = time.monotonic() + timeout
    while b"\n" not in self.rest:
      ready, _, _ = select.select([self.answers], [], [], max(0.0, deadline - time.monotonic()))
      if not ready:
        raise Lost(self._end(late))
      more = os.read(self.answers, 1 << 16)
      if not more:
        raise Lost(self._end(None))
      self.rest += more
    line, self.rest = self.rest.split(b"\n", 1)
    return json.loads(line)

  def _end(self, reason: str | None) -> str:
    """Kills what still runs; `reason`, or how the process ended by itself, with its last words."""
    if reason is None:
      with contextlib.suppress(subprocess.TimeoutExpired):
        self.process.wait(20)  # a core dump takes a while
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    try:
      code = self.process.wait(60)
    except subprocess.TimeoutExpired:  # a driver that does not let go of it
      code, reason = 0, f"{reason or 'ended'}, and could not be killed"
    if reason is None:
      reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    self.said.seek(0)
    words = [line.strip() for line in self.said.read().decode(errors="replace").splitlines() if line.strip()]
    self.said.close()
    os.close(self.answers)
    with contextlib.suppress(OSError):
      self.process.stdin.close()
    self.process = None
    return reason + (f": {worst(words)}" if words else "")


def worst(lines: list[str]) -> str:
  """The line of an output that most likely says what went wrong."""
  marks = ("CUDA_ERROR", "RESOURCE_EXHAUSTED", "Check failed", "Error:", "Fatal", "F0")
  return next((line for mark in marks for line in reversed(lines) if mark in line), lines[-1])[:300]


def serve(handle: Callable[[dict], dict]) -> None:
  """The child's side: answers each line of standard input with `handle`'s, until there is no more."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a hung child must not outlive its parent
  with os.fdopen(int(os.environ[ANSWERS]), "w") as answers:
    print(json.dumps({}), file=answers, flush=True)
    for line in sys.stdin:
      print(json.dumps(handle(json.loads(line))), file=answers, flush=True)

"""Programs of strangers (chat templates, regular expressions), run where they can do no harm.

Each runs in a child process with a limit on its memory, on the processor's time for one call, and on what it writes;
when it exceeds one, only the child ends. Nothing in this process could bound a pattern that backtracks for ever, or a
list that holds itself twice, forty levels deep. Children are kept for the next call, one for each thread that calls.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

SECONDS = 1.0  # of the processor, for one call
MEMORY = 1 << 29  # bytes of address space, Python's own 60 MB included
OUTPUT = 1 << 25  # characters
PATIENCE = 60.0  # seconds for an answer on a machine that is busy with other things

_CHILD = Path(__file__).with_name("bounded_child.py")
_idle: list["_Child"] = []
_lock = threading.Lock()
_places = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))


class Exceeded(Exception):
  """The program ran into a limit; the message says which."""


class Failed(Exception):
  """The program raised an error, whose type and message are the message."""


def run(program: Path, *texts: str) -> str:
  """What the function `run` of a Python file makes of some texts.

  Args:
    program: a file that imports nothing of jaxllm.

  Raises:
    Exceeded, Failed.
  """
  parts = [text.encode("utf-8", "surrogatepass") for text in texts]
  head = json.dumps([str(program), [len(part) for part in parts]]).encode() + b"\n"
  request = b"".join((head, *parts))
  with _places:
    while True:
      with _lock:
        child = _idle.pop() if _idle else None
      fresh = child is None
      child = child or _Child()
      try:
        kind, text = child.ask(request)
      except _Ended:
        child.end()
        if not fresh:  # it may have been ended by others while it had nothing to do
          continue
        raise Exceeded("it ends the process it runs in") from None
      except BaseException:
        child.end()
        raise
      break
    if kind == "limit":
      child.end()
      raise Exceeded(text)
    with _lock:
      _idle.append(child)
  if kind == "failed":
    raise Failed(text)
  return text


class _Ended(Exception):
  """A child's process is no more."""


class _Child:
  def __init__(self):
    command = [sys.executable, "-P", "-B", str(_CHILD), str(SECONDS), str(MEMORY), str(OUTPUT)]
    # Not of this process's group: Ctrl-C is for us, and it ends when its input does.
    self._process = subprocess.Popen(  # noqa: S603  (a program of ours; what it works on is its input)
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    self._answers = select.poll()
    self._answers.register(self._process.stdout, select.POLLIN)

  def ask(self, request: bytes) -> tuple[str, str]:
    """The kind of an answer and its text.

    Raises:
      Exceeded: it takes too long. _Ended: the process is no more.
    """
    try:
      self._process.stdin.write(request)
      self._process.stdin.flush()
    except BrokenPipeError:
      raise _Ended from None
    if not self._answers.poll(PATIENCE * 1000):
      raise Exceeded(f"it takes more than {PATIENCE:.0f} s")
    line = self._process.stdout.readline()
    if not line:
      raise Exceeded(f"it takes more than {SECONDS:g} s") if self._process.wait() == -signal.SIGPROF else _Ended
    # What is cut short is of a process that was ended while it wrote.
    if not line.endswith(b"\n"):
      raise _Ended
    kind, length = json.loads(line)
    data = self._process.stdout.read(length)
    if len(data) < length:
      raise _Ended
    return kind, data.decode("utf-8", "surrogatepass")

  def end(self) -> None:
    self._process.kill()
    with contextlib.suppress(OSError):
      self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()

  def forget(self) -> None:
    """After a fork: it is the other process's."""
    self._process.returncode = 0


def _end_all() -> None:
  while _idle:
    _idle.pop().end()


def _after_fork() -> None:
  global _lock, _places
  _lock, _places = threading.Lock(), threading.BoundedSemaphore(max(2, os.cpu_count() or 1))
  for child in _idle:
    child.forget()
  _idle.clear()


atexit.register(_end_all)
os.register_at_fork(after_in_child=_after_fork)

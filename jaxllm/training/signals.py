"""Stopping a run politely: the first signal asks, the second insists; and SIGUSR1, which asks for a checkpoint."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from jaxllm.base import stopping

# SIGUSR2 is what submitit has schedulers send ahead of the end of a job.
SIGNALS = (*stopping.STOPS, signal.SIGUSR2)


class StopRequest:
  """Turns the first SIGTERM, Ctrl-C, SIGHUP or SIGUSR2 into a flag; a second one does what it did before.

      with StopRequest() as stop:
        for step in ...:
          ...
          if stop.requested:
            break  # save and leave with exit code 0

  SIGTERM and SIGINT within two seconds of each other are one request. SIGUSR1 (SLURM's --signal=USR1@60, say) asks
  for a checkpoint, after which the run goes on: `saves` counts how often. A signal that was ignored when the program
  began stays so if it is SIGINT or SIGHUP.

  A signal reaches one process; what all of them do about it they agree on (`jaxllm.parallel.agreement`).
  Python delivers signals to the main thread only; entered in another thread, this installs nothing.
  """

  def __init__(self):
    self.requested = False
    self._asked = stopping.Requests()
    self._before: dict[int, Any] = {}
    self._stack = contextlib.ExitStack()

  @property
  def saves(self) -> int:
    """How often a checkpoint was asked for."""
    return stopping.saves_asked

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      self._stack.enter_context(stopping.patience())
      self._before = {n: signal.signal(n, self._receive) for n in SIGNALS if not stopping.is_ignored(n)}
      self._before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, stopping.note)
    return self

  def __exit__(self, *error) -> None:
    self._restore()
    self._stack.close()

  def _receive(self, number: int, frame: FrameType | None) -> None:
    if self._asked.insists(number):
      self._restore()
      signal.raise_signal(number)
      return
    if self.requested:
      return
    self.requested = True
    # Handed back at once: the same signal then works even inside a long call that never returns to Python.
    signal.signal(number, self._before.pop(number))
    # Not print: the signal may have come in the middle of one. The terminal may be gone.
    with contextlib.suppress(OSError):
      os.write(2, b"\nstopping after this step; once more to stop at once\n")

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

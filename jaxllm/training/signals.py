"""Stopping a run politely: the first signal asks, the second insists."""

import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
  """Turns the first SIGTERM or Ctrl-C into a flag; a second one does what it did before.

      with StopRequest() as stop:
        for step in ...:
          ...
          if stop.requested:
            break  # save and leave with exit code 0

  A signal reaches one process; what all of them do about it they agree on (`jaxllm.parallel.agreement`).
  Python delivers signals to the main thread only; entered in another thread, this installs nothing.
  """

  def __init__(self):
    self.requested = False
    self._before: dict[int, object] = {}

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
    return self

  def __exit__(self, *error) -> None:
    self._restore()

  def _receive(self, number, frame) -> None:
    self.requested = True
    # Handed back at once: the second signal then works even inside a long call that never returns to Python.
    self._restore()
    # Not print: the signal may have come in the middle of one.
    os.write(2, b"\nstopping after this step; once more to stop at once\n")

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

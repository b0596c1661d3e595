"""Noticing that a process of a job is gone, and ending the others.

A process whose peer is gone waits in a collective for ever: only another thread can end it. Every process posts a
beat to the job's key-value store every second or two; process 0 looks at all beats, and the others look whether the
store, which lives in process 0, answers. Whoever leaves with an error posts the reason first. The first reason posted
ends them all: each prints it on one line and exits with code 2.

What is noticed: a process that was killed or is stopped, a host without power or network, an error. What is not: a
process that lives but does not get on, in an endless loop or in a collective that hangs. A step that takes hours is
not ended here.

Silence is counted in rounds of this process's own thread and not in seconds: a process that was itself suspended, or
got no time, blames nobody for it. Beats come from a thread of Python: compiling and computing let it run, and a call
that holds Python's lock for longer than `patience_s` would be taken for death.
"""

import contextlib
import ctypes
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

BEATS, REASON, LEFT = "jaxllm/watch/beat/", "jaxllm/watch/reason/", "jaxllm/watch/left/"
AGAIN = "started again with the same command, all processes go on from the last checkpoint"


class Watch:
  """Watches the other processes of the job; ends this one when one of them is gone.

  Args:
    client: the client of jax's coordination service.
    index: this process.
    count: all processes.
    patience_s: how long a process may be silent.
  """

  def __init__(self, client: Any, index: int, count: int, patience_s: float):
    self._client, self._index, self._count = client, index, count
    self.patience_s = patience_s
    self._interval = min(2.0, patience_s / 6)
    self._enough = math.ceil(patience_s / self._interval)
    self._rounds = 0
    self._stopped = threading.Event()
    self._last_line = threading.Lock()  # whoever takes it speaks for this process; it is not given back
    self._ending, self._code = threading.Event(), 2
    targets = [self._look, self._last_resort] + [self._look_at_first] * (index > 0)
    self._threads = [threading.Thread(target=target, daemon=True, name="jaxllm-watch") for target in targets]

  def start(self) -> None:
    for thread in self._threads:
      thread.start()

  def stop(self) -> None:
    """Ends the watch, when all processes have come to their end."""
    self._stopped.set()
    self._ending.set()
    for thread in self._threads:
      thread.join(self.patience_s)

  def end(self, line: str, code: int = 2, reason: str | None = None, gone: int | None = None) -> NoReturn:
    """Says `line` ("" if all is said) and ends this process; of several callers only the first is heard.

    Args:
      reason: what the other processes shall say of this one.
      gone: the process that does not answer any more, if it is that.
    """
    if not self._last_line.acquire(blocking=False):
      threading.Event().wait()  # for the end
    self._code = code
    self._ending.set()
    if reason is not None:
      self._post(self._index, reason)
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      sys.stderr.flush()
    if line:
      os.write(2, f"process {self._index}: {line}\n".encode())
    with contextlib.suppress(Exception):
      if gone == 0:
        pass  # and the store with it
      elif self._index > 0:
        self._client.key_value_set(LEFT + str(self._index), "")
      else:  # the store ends with this process; the others shall read the reason first
        while len(self._client.key_value_dir_get(LEFT)) < self._count - 1 - (gone is not None):
          time.sleep(0.05)
    os._exit(code)

  def _look(self) -> None:
    """Beats, and looks for a reason to end; in process 0, at the beats of the others."""
    beats: dict[str, str] = {}
    silent = dict.fromkeys(range(1, self._count) if self._index == 0 else (), 0)
    while not self._stopped.wait(self._interval):
      try:
        self._client.key_value_set(f"{BEATS}{self._index}", str(self._rounds), allow_overwrite=True)
        reasons = self._client.key_value_dir_get(REASON)
        now = dict(self._client.key_value_dir_get(BEATS)) if silent else {}
      except Exception:
        if self._stopped.is_set():
          return
        self.end(f"error: process 0 is gone; {AGAIN}", gone=0)
      for _, text in reasons:
        index, reason = json.loads(text)
        self.end(f"error: process {index} {reason}; {AGAIN}", gone=index if reason == self._silence else None)
      for index in silent:
        key = f"{BEATS}{index}"
        silent[index] = silent[index] + 1 if now.get(key) == beats.get(key) else 0
        if silent[index] >= self._enough:
          self._post(index, self._silence)
      beats = now
      self._rounds += 1

  def _post(self, index: int, reason: str) -> None:
    """Tells all why they end; a reason that stands there already is the one that counts."""
    with contextlib.suppress(Exception):
      self._client.key_value_set(REASON + "first", json.dumps([index, reason]))

  def _look_at_first(self) -> None:
    """Ends this process when the store has not answered `_look` for long."""
    rounds, silent = self._rounds, 0
    while not self._stopped.wait(self._interval):
      silent = silent + 1 if self._rounds == rounds else 0
      rounds = self._rounds
      if silent >= self._enough:
        self.end(f"error: process 0 {self._silence}; {AGAIN}", gone=0)

  def _last_resort(self) -> None:
    """Whatever hangs while this process ends (a full pipe, a store that does not answer), it ends."""
    self._ending.wait()
    if not self._stopped.wait(5 + 2 * self._interval):
      os._exit(self._code)

  @property
  def _silence(self) -> str:
    return f"has not been heard of for {self.patience_s:g} s"


_handlers: list[Any] = []  # what C++ calls must stay alive


def when_coordination_fails(act: Callable[[], None]) -> Callable | None:
  """Has `act` called where jax's coordination client would abort the process with a C++ stack.

  Returns:
    The client's `missed_heartbeat_callback`; None where this C++ library is not the one jaxlib was built with.

  The client cannot hand its error to a callback of Python: it throws std::bad_cast in a thread of its own, which
  ends in C++'s terminate handler. That handler is replaced; for anything else it calls the one before.
  """
  try:
    library = ctypes.CDLL("libstdc++.so.6")
    current_type, set_terminate = library.__cxa_current_exception_type, library._ZSt13set_terminatePFvvE
  except (OSError, AttributeError):
    return None
  handler_type = ctypes.CFUNCTYPE(None)
  current_type.restype = ctypes.c_void_p
  set_terminate.restype, set_terminate.argtypes = ctypes.c_void_p, [handler_type]
  before = None

  def handler() -> None:
    kind = current_type()
    # A std::type_info is a pointer to its methods and one to its name.
    name = ctypes.cast(kind, ctypes.POINTER(ctypes.c_char_p))[1] if kind else b""
    if name == b"St8bad_cast":
      act()
    if before:
      handler_type(before)()
    os.abort()

  _handlers.append(handler_type(handler))
  before = set_terminate(_handlers[-1])
  return lambda *status: act()

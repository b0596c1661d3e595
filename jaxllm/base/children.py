"""Processes that multiprocessing starts for us (grain's workers): when they end is for this process to decide."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

from jaxllm.base.stopping import STOPS

HEARD = (*STOPS, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
  """While it lasts, processes that Python's multiprocessing starts are born deaf to what asks a program to stop.

  A terminal sends Ctrl-C, and a scheduler its signals, to all processes of a job; what they are to do about it this
  one decides.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
  try:
    resource_tracker.ensure_running()  # a process too; it lets go of some of the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
  """In a process of multiprocessing's: ends it when the one that has started it ends, whatever ended that."""
  parent = multiprocessing.parent_process()

  def wait() -> None:
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=wait, daemon=True).start()

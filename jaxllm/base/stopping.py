"""How signals end a program: Ctrl-C, SIGTERM and SIGHUP at any moment, with one line and 128 + the signal's number.

Raising KeyboardInterrupt wherever the main thread happens to be is not enough. In the middle of an import it leaves
half a module and is often swallowed, so there the program ends at once. In a destructor or a callback Python drops it,
and inside C++ it waits; so a thread that hears of signals at once, from the C handler's pipe, ends the program when
that has not happened within PATIENCE_S, or when a second signal insists. And once the program is interrupted it
must not tear the interpreter down: threads of C++ still compute with what would be freed (a crash in four of nine).
`leave` flushes and ends without that.

A signal that the parent has ignored stays ignored if it is SIGINT (a shell's background job) or SIGHUP (nohup).
SIGTERM works in any case. SIGUSR1 is noted: a training run that it reaches while it starts saves later.
"""

import atexit
import contextlib
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

PATIENCE_S = 5.0  # for the program to clean up by itself
TOGETHER_S = 2.0  # schedulers send SIGTERM and SIGINT one after the other, and mean one request
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LINE = b"stopped\n"


class Requests:
  """Counts what asks a program to stop: the first asks, another one insists."""

  def __init__(self) -> None:
    self.first: tuple[int, float] | None = None

  def insists(self, number: int) -> bool:
    """Whether this signal comes on top of an earlier one: the same once more, or another one later."""
    now = time.monotonic()
    if self.first is None:
      self.first = number, now
      return False
    return number == self.first[0] or now - self.first[1] > TOGETHER_S


class Interrupted(KeyboardInterrupt):
  """A signal has asked the program to stop; `code` is what it exits with."""

  def __init__(self, number: int = signal.SIGINT):
    super().__init__()
    self.code = 128 + number


_patient = False  # somebody takes the first signal as a request of its own, and may need long
_apart = False  # Ctrl-C ends something else than the program
_over = False  # the program's work is done
interrupted: int | None = None  # the signal that has; a library may have made another error of Interrupted
saves_asked = 0  # SIGUSR1's so far


def is_ignored(number: int) -> bool:
  """Whether this process began with the signal ignored, and leaves it so."""
  return number in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(number) is signal.SIG_IGN


@functools.cache
def runs_a_door() -> bool:
  """Whether this process is one of our programs, `python -m jaxllm.…` or `jaxllm …`, and not somebody else's; as it was
  when this package was imported, whatever has become of sys.argv since."""
  words = sys.orig_argv
  module = any(flag == "-m" and re.fullmatch(r"jaxllm(\.\w+)?", name) for flag, name in zip(words, words[1:]))
  return module or os.path.basename(sys.argv[0]) == "jaxllm"


def install() -> None:
  """Takes the signals of this program; once, in the main thread."""
  if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is _interrupt:
    return
  for number in STOPS:
    if not is_ignored(number):
      signal.signal(number, _interrupt)
  signal.signal(signal.SIGUSR1, note)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
  threading.Thread(target=_insist, args=(reader,), name="signals", daemon=True).start()
  os.register_at_fork(after_in_child=_hand_back)


@contextlib.contextmanager
def patience() -> Iterator[None]:
  """While it lasts, a first signal is somebody's own, who sets a handler for it; a second one ends the program."""
  global _patient
  before, _patient = _patient, True
  try:
    yield
  finally:
    _patient = before


@contextlib.contextmanager
def interrupts_apart() -> Iterator[None]:
  """While it lasts, Ctrl-C is Python's KeyboardInterrupt as often as it comes: of a chat it ends the reply."""
  global _apart
  handler = signal.getsignal(signal.SIGINT)
  taken = handler is _interrupt
  if taken:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  before, _apart = _apart, True
  try:
    yield
  finally:
    _apart = before
    if taken:
      signal.signal(signal.SIGINT, handler)


def finish(code: int) -> None:
  """Ends the program, whose work is done: threads and what was registered for the end are waited for, but the
  interpreter is not taken down, which takes one to two seconds where XLA's programs are freed one by one, and in which
  a signal would find no handler. From here on a signal ends the program without a word."""
  global _over
  _over = True
  threading._shutdown()  # type: ignore[attr-defined]
  atexit._run_exitfuncs()
  leave(code)


def leave(code: int, line: bytes = b"") -> None:
  """Ends the program at once, what was printed included, without taking the interpreter down."""
  with contextlib.suppress(Exception):
    sys.stdout.flush()
  with contextlib.suppress(Exception):
    sys.stderr.flush()
  with contextlib.suppress(OSError):
    os.write(2, line)
  os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
  global interrupted
  if _over:
    os._exit(128 + number)
  while frame is not None:
    if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
      leave(128 + number, LINE)
    frame = frame.f_back
  for each in STOPS:  # what cleans up is not to be interrupted; the thread listens on
    if not is_ignored(each):
      signal.signal(each, _nothing)
  interrupted = number
  raise Interrupted(number)


def _nothing(number: int, frame: FrameType | None) -> None:
  """A handler in Python, unlike SIG_IGN, lets the thread hear of the signal."""


def note(number: int, frame: FrameType | None) -> None:
  """The handler of SIGUSR1."""
  global saves_asked
  saves_asked += 1


def _insist(reader: int) -> None:
  """Ends the program when it does not do so by itself."""
  asked = Requests()
  while data := os.read(reader, 1):
    if data[0] not in STOPS or (_apart and data[0] == signal.SIGINT):
      continue
    if asked.insists(data[0]):
      leave(128 + data[0], LINE)
    if not _patient:
      timer = threading.Timer(PATIENCE_S, leave, (128 + data[0], LINE))
      timer.daemon = True
      timer.start()


def _hand_back() -> None:
  """In a child by fork: its signals are its own."""
  signal.set_wakeup_fd(-1)
  for number in (*STOPS, signal.SIGUSR1):
    if signal.getsignal(number) in (_interrupt, _nothing, note):
      signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

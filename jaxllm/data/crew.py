"""The processes that do a stage of a prepare on this machine, and the line that says how far they are."""

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jaxllm.base.errors import DataError, UserError
from jaxllm.data.job import Job, work_through
from jaxllm.data.survey import count_unit, groups_of, survey_group, uncounted
from jaxllm.data.tokenize import Tokenize

_SMALL = 48 << 20  # bytes of text that one process has tokenized before others have started
_EVERY_S = 10.0  # between lines where there is no terminal
_POLL_S = 0.1


def default_processes() -> int:
  """As many as there are cores that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sizes_of(job: Job, stage: str) -> list[int]:
  """Bytes of text of each unit of a stage."""
  if stage == "lines":
    return [unit.size for unit in uncounted(job)]
  sizes = [unit.size for _, unit in job.units]
  return [sum(sizes[unit] for unit in group) for group in groups_of(job)] if stage == "survey" else sizes


def do_units(job: Job, stage: str, done: Callable[[int], None]) -> None:
  """Does in this process what of a stage nobody else does; `done` is told the number of each unit."""
  by_stage = {"lines": count_unit, "survey": survey_group}
  do = functools.partial(by_stage[stage], job) if stage in by_stage else Tokenize(job)
  work_through(job, stage, len(sizes_of(job, stage)), do, done)


def do_stage(job: Job, stage: str, processes: int | None, log: Callable[[str], None]) -> None:
  """Does a stage with processes of this machine, others' too; returns when all of it is done.

  Args:
    processes: None: one a core, and this one alone where there is little to do.

  Raises:
    UserError: what a process has found wrong; the others are stopped.
  """
  units = len(sizes_of(job, stage))
  if all(job.place(stage, number).is_dir() for number in range(units)):
    return
  small = sum(unit.size for _, unit in job.units) < _SMALL and processes is None
  count = 1 if small else min(default_processes() if processes is None else processes, units)
  with contextlib.closing(Progress(job, stage, log)) as progress:
    if count == 1:
      do_units(job, stage, progress.done)
    else:
      _run_crew(job, stage, count, progress)


class Progress:
  """Bytes done, per second, and when the rest will be; one line that stays in place on a terminal."""

  def __init__(self, job: Job, stage: str, log: Callable[[str], None]):
    self._sizes = sizes_of(job, stage)
    self._job, self._stage, self._log = job, stage, log
    self._terminal = sys.stderr.isatty()
    self._started = self._said = time.monotonic()
    self._here = 0
    self._left = [n for n in range(len(self._sizes)) if not job.place(stage, n).is_dir()]

  def done(self, number: int) -> None:
    """A unit was done here."""
    self._here += self._sizes[number]
    self.tick()

  def tick(self) -> None:
    """Says how far it is, now and then."""
    now = time.monotonic()
    if now - self._said < (1.0 if self._terminal else _EVERY_S):
      return
    self._said = now
    self._left = [n for n in self._left if not self._job.place(self._stage, n).is_dir()]
    left, total = sum(self._sizes[n] for n in self._left), sum(self._sizes)
    rate = self._here / (now - self._started)
    eta = f", {_duration(left / rate)} left" if rate and left else ""
    speed = f", {rate / 1e6:.1f} MB/s here" if rate else ""
    line = f"{self._stage}: {(total - left) / 1e9:.2f} of {total / 1e9:.2f} GB{speed}{eta}"
    if self._terminal:
      print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    else:
      self._log(line)

  def close(self) -> None:
    if self._terminal and self._said != self._started:
      print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
  hours, minutes = int(seconds // 3600), int(seconds // 60) % 60
  return (
    f"{hours} h {minutes} min" if hours else f"{minutes} min {int(seconds) % 60} s" if minutes else f"{seconds:.0f} s"
  )


def _run_crew(job: Job, stage: str, count: int, progress: Progress) -> None:
  """Starts processes and waits for all; what one says of an error is raised here."""
  paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]  # where this package is
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
  environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # the others have the other cores
  command = [sys.executable, "-m", "jaxllm.data.worker", str(job.root), stage]
  said: queue.Queue[dict] = queue.Queue()

  def listen(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    try:
      for line in process.stdout:
        said.put(json.loads(line))
    finally:
      said.put({"ended": process.wait()})

  with contextlib.ExitStack() as stack:
    for _ in range(count):
      # In sessions of their own, so that Ctrl-C reaches this process alone; the pipe to them ends with it.
      process = subprocess.Popen(  # noqa: S603  (a program of ours)
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
      )
      stack.enter_context(process)
      listener = threading.Thread(target=listen, args=(process,), daemon=True)
      listener.start()
      stack.callback(listener.join)
      stack.callback(process.kill)  # the first of the three at the end
    while count:
      progress.tick()
      with contextlib.suppress(queue.Empty):
        message = said.get(timeout=_POLL_S)
        _hear(message, progress)
        count -= "ended" in message


def _hear(message: dict, progress: Progress) -> None:
  """Takes note of what a process said; raises its error."""
  if "done" in message:
    progress.done(message["done"])
  elif "errno" in message:
    raise OSError(message["errno"], message["error"], message["file"])
  elif "error" in message:
    raise DataError(message["error"])
  elif message["ended"]:
    raise _death(message["ended"])


def _death(code: int) -> UserError:
  if code < 0:
    return DataError(
      f"a process of prepare was killed by signal {-code}{' (out of memory?)' if code == -9 else ''}: run the same "
      "command again, which goes on from here, with fewer --processes perhaps"
    )
  return DataError(f"a process of prepare ended with code {code}; what it said stands above")

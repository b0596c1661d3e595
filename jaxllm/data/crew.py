"""The processes that do a stage of a prepare on this machine, and the line that says how far they are."""

import contextlib
import json
import os
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


def stage_of(job: Job, stage: str) -> tuple[int, Callable[[int, Path], None], Callable[[int], int]]:
  """How many units a stage has, what does one, and how many bytes of text it has."""
  if stage == "lines":
    sizes = [unit.size for _, unit in job.units if unit.first is None]
    return uncounted(job), lambda number, place: count_unit(job, number, place), sizes.__getitem__
  sizes = [unit.size for _, unit in job.units]
  if stage == "survey":
    groups = groups_of(job)
    return len(groups), lambda n, place: survey_group(job, n, place), lambda n: sum(sizes[u] for u in groups[n])
  return len(sizes), Tokenize(job), sizes.__getitem__


def do_stage(job: Job, stage: str, processes: int | None, log: Callable[[str], None]) -> None:
  """Does a stage with processes of this machine, others' too; returns when all of it is done.

  Args:
    processes: None: one a core, and this one alone where there is little to do.

  Raises:
    UserError: what a process has found wrong; the others are stopped.
  """
  units = {"lines": uncounted(job), "survey": len(groups_of(job)), "tokenize": len(job.units)}[stage]
  places = [job.place(stage, number) for number in range(units)]
  if all(place.is_dir() for place in places):
    return
  small = job.total_bytes < _SMALL and processes is None
  count = 1 if small else min(default_processes() if processes is None else processes, units)
  with contextlib.closing(Progress(job, stage, log)) as progress:
    if count == 1:
      total, do, _ = stage_of(job, stage)
      work_through(job, stage, total, do, progress.done)
    else:
      _run_crew(job, stage, count, progress)


class Progress:
  """Bytes done, per second, and when the rest will be; one line that stays in place on a terminal."""

  def __init__(self, job: Job, stage: str, log: Callable[[str], None]):
    self._sizes: list[int] = [unit.size for _, unit in job.units if stage != "lines" or unit.first is None]
    if stage == "survey":
      self._sizes = [sum(self._sizes[unit] for unit in group) for group in groups_of(job)]
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
  crew: list[subprocess.Popen] = []
  said: list[dict] = []

  def listen(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    for line in process.stdout:
      said.append(json.loads(line))

  try:
    for _ in range(count):
      # In sessions of their own, so that Ctrl-C reaches this process alone; the pipe to them ends with it.
      crew.append(
        subprocess.Popen(  # noqa: S603  (a program of ours)
          command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
      )
    threads = [threading.Thread(target=listen, args=(process,), daemon=True) for process in crew]
    for thread in threads:
      thread.start()
    heard = 0
    while any(process.poll() is None for process in crew) or any(thread.is_alive() for thread in threads):
      time.sleep(_POLL_S)
      progress.tick()
      heard = _hear(said, heard, progress)
      for process in crew:
        if process.poll():
          threads[crew.index(process)].join()
          _hear(said, heard, progress)
          raise _death(process.returncode)
    _hear(said, heard, progress)
  finally:
    for process in crew:
      process.kill()
    for process in crew:
      process.wait()
      for pipe in (process.stdin, process.stdout):
        if pipe is not None:
          pipe.close()


def _hear(said: list[dict], heard: int, progress: Progress) -> int:
  """Takes note of what the processes said; raises the errors."""
  for message in said[heard:]:
    if "done" in message:
      progress.done(message["done"])
    elif "errno" in message:
      raise OSError(message["errno"], message["error"], message["file"])
    else:
      raise DataError(message["error"])
  return len(said)


def _death(code: int) -> UserError:
  if code < 0:
    return DataError(
      f"a process of prepare was killed by signal {-code}{' (out of memory?)' if code == -9 else ''}: run the same "
      "command again, which goes on from here, with fewer --processes perhaps"
    )
  return DataError(f"a process of prepare ended with code {code}; what it said stands above")

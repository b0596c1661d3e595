"""What the processes of a prepare share: a directory with the job's units, and one with the results of each stage.

A unit of a stage is done when its directory is there: it is filled under another name, then renamed. Whoever works on
one holds a lock of the kernel, so that what a dead process or host has begun is taken over, and what is done is never
done again.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.base import digests, settings
from jaxllm.base.files import write_atomically
from jaxllm.data.arrays import flush
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import content_of, example_sources
from jaxllm.data.paths import File
from jaxllm.data.sources import Source
from jaxllm.data.units import Unit

_INTERVAL_S = 0.2
_FILE = "job.json"
_STAGE = "stage"


@dataclasses.dataclass(frozen=True)
class Job:
  """One prepare: its sources and their units, and the directory where its processes meet."""

  root: Path
  config: DataConfig
  sources: Sequence[Source]
  slugs: Sequence[str]  # the sources' names as TFDS wants them

  @property
  def units(self) -> list[tuple[int, Unit]]:
    """All units, with the number of their source."""
    return [(number, unit) for number, source in enumerate(self.sources) for unit in source.units]

  @property
  def numbers(self) -> list[list[int]]:
    """Of each source the numbers of its units among all."""
    ends = itertools.accumulate((len(source.units) for source in self.sources), initial=0)
    return [list(range(start, end)) for start, end in itertools.pairwise(ends)]

  @property
  def tokenizer(self) -> Path:
    """Where the tokenizer is, once there is one."""
    return self.root / "tokenizer"

  def place(self, stage: str, number: int) -> Path:
    """Where the results of a unit are, once they are whole."""
    return self.root / stage / f"{number:06d}" / "done"

  def facts(self, stage: str, number: int) -> dict[str, Any]:
    """`facts.json` of a unit that is done."""
    return json.loads((self.place(stage, number) / "facts.json").read_bytes())

  def write(self) -> None:
    """Lets other processes open it; what is there of a job with other units goes."""
    units = [source.units for source in self.sources]
    names = [source.name for source in self.sources]
    facts = {"config": settings.to_mapping(self.config), "names": names, "slugs": self.slugs, "units": units}
    if (self.root / _FILE).exists() and (self.root / _FILE).read_bytes() != json.dumps(facts).encode():
      shutil.rmtree(self.root)
      self.root.mkdir()
    write_atomically(self.root / _FILE, json.dumps(facts))

  def announce(self, stage: str) -> None:
    """Tells processes of other hosts what there is to do."""
    write_atomically(self.root / _STAGE, stage)

  def announced(self) -> str:
    """The stage that the last `announce` named; "" before the first."""
    with contextlib.suppress(FileNotFoundError):
      return (self.root / _STAGE).read_text(errors="replace")
    return ""


def open_job(root: Path) -> Job:
  """The job that `Job.write` has written; FileNotFoundError before."""
  facts = json.loads((root / _FILE).read_bytes())
  config = settings.from_mapping(DataConfig, facts["config"])
  sources = [
    Source(source, name, [_unit(values) for values in units], content_of(config.task), config.on_bad_row, "")
    for source, name, units in zip(example_sources(config), facts["names"], facts["units"])
  ]
  return Job(root, config, sources, facts["slugs"])


def _unit(values: list) -> Unit:
  files, *rest = values
  return Unit(tuple(File(*file) for file in files), *rest)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
  """Whether nobody else holds the lock on a file, which is then held while the context lasts.

  True too where the file system has no locks; two that do the same do no harm.
  """
  file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  try:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter is what some systems say of a lock that is held
      yield False
      return
    except OSError:
      pass
    yield True
  finally:
    os.close(file)


def work_through(
  job: Job, stage: str, count: int, do: Callable[[int, Path], None], done: Callable[[int], None]
) -> None:
  """Does what of a stage nobody else does; returns when all of it is done.

  Args:
    count: how many units the stage has.
    do: fills a directory with the results of one.
    done: is told the number of each that was done here.
  """
  left = list(range(count))
  while left:
    others = []
    for number in left:
      place = job.place(stage, number)
      if place.is_dir():
        continue
      place.parent.mkdir(parents=True, exist_ok=True)
      with claimed(place.parent / "claim") as mine:
        if not mine:
          others.append(number)
        elif not place.is_dir():
          _fill(place, lambda directory, number=number: do(number, directory))  # type: ignore[misc]
          done(number)
    left = others
    if left:
      time.sleep(_INTERVAL_S)


def _fill(place: Path, do: Callable[[Path], None]) -> None:
  for old in place.parent.glob("partial-*"):  # of a process that has died
    shutil.rmtree(old, ignore_errors=True)
  partial = place.parent / f"partial-{socket.gethostname()}-{uuid.uuid4().hex}"
  partial.mkdir()
  try:
    do(partial)
    digests.seal(partial)
    for path in partial.iterdir():
      flush(path)
    with contextlib.suppress(FileExistsError):
      partial.rename(place)
  except OSError:
    if not place.is_dir():  # somebody else may have done it, where there are no locks
      raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def drop_damaged(job: Job, log: Callable[[str], None]) -> None:
  """Removes what is not as it was written, and is then made again: results of units; the tokenizer, with all that was
  made with it.

  Shards have sums of their own; of them the size is looked at.
  """
  if job.tokenizer.is_dir() and _is_damaged(job.tokenizer, log):
    for place in (job.root / "tokenize", job.tokenizer):  # a run that is killed here finds the tokenizer damaged again
      shutil.rmtree(place, ignore_errors=not place.exists())
  for place in sorted(job.root.glob("*/*/done")):
    if _is_damaged(place, log):
      shutil.rmtree(place)


def _is_damaged(place: Path, log: Callable[[str], None]) -> bool:
  try:
    manifest = place / digests.NAME
    files = digests.files_of(digests.read_signed(manifest), manifest)
    digests.verify(place, files, [name for name in files if not name.endswith(".array_record")])
    for name in files:
      if not (place / name).is_file() or (place / name).stat().st_size != files[name]["bytes"]:
        raise digests.DamagedError(f"{place / name} is cut short")
  except digests.DamagedError as error:
    log(f"warning: {error}; it is made again")
    return True
  return False


def write_facts(directory: Path, facts: dict[str, Any]) -> None:
  (directory / "facts.json").write_text(json.dumps(facts))

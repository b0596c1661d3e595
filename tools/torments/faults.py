"""A disk that is full, read-only or not ours, too few files or too little memory: one line, and nothing half-written.

After each fault the same command runs again without it, and must end as if there had been none.
"""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxllm.cli import LEAST_FILES
from torments import readings
from torments.corruptions import Row, leftovers, words
from torments.trials import Limits, Outcome, door, trial
from torments.world import World, write_job


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[bool]:
  """A file system of `size` bytes at `place`; False where this user may not mount one."""
  place.mkdir(parents=True, exist_ok=True)
  mounted = not subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True
  ).returncode
  try:
    yield mounted
  finally:
    if mounted:
      subprocess.run(["umount", "-l", str(place)], check=True)
    shutil.rmtree(place, ignore_errors=True)


def _remount(place: Path, options: str) -> None:
  subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def _jobs(world: World, place: Path) -> list[tuple[str, list[str], object, str]]:
  """(door, arguments, how to read what it writes, what to read) of each door that writes into `place`."""
  job = write_job(place, world.corpus)
  return [
    ("prepare", [f"--config={job}"], readings.read_data, str(job)),
    ("train", [f"--config={world.config}", f"--workdir={place / 'run'}"], readings.read_model, str(place / "run")),
    *(
      (
        "convert",
        [f"--from={world.run}", f"--to={place / to}", f"--format={form}"],
        readings.read_model,
        str(place / to),
      )
      for form, to in (("jaxllm", "model"), ("hf", "hf"), ("gguf", "m.gguf"))
    ),
  ]


def _then_again(name: str, argv: Sequence[str], reading, what: str, whole: str, first: Outcome, place: Path) -> str:
  """The result of a trial: that of the fault itself, unless the door had no trouble or the next try is not whole."""
  if first.verdict not in ("refused", "done"):
    return first.verdict
  if first.verdict == "refused" and name != "train" and (left := leftovers(place)):
    return f"left behind: {left[0]}"
  again = first if first.verdict == "done" else door(name, *argv)
  if again.verdict != "done":
    return f"not mended afterwards: {words(again)}"
  found = trial(reading, what)
  if found.verdict != "done" or found.out != whole:
    return f"other result afterwards: {words(found)}"
  return "refused" if first.verdict == "refused" else "same"


def _wholes(world: World) -> dict[str, str]:
  """What each door's result reads as without a fault."""
  found, place = {}, world.root / "whole"
  for name, argv, reading, what in _jobs(world, place):
    done = door(name, *argv)
    if done.verdict != "done":
      raise SystemExit(f"{name} fails without a fault: {done.err[-2000:]}")
    found[Path(what).name if name != "prepare" else name] = trial(reading, what).out
  shutil.rmtree(place)
  return found


def full_disks(world: World, rounds: int, seed: int) -> Iterator[Row]:
  """File systems with room for a part of what is written."""
  draw, wholes = random.Random(f"{seed} disks"), _wholes(world)
  place = world.root / "disk"
  for number in range(rounds):
    for index in range(len(_jobs(world, world.root / "unused"))):
      size = int(2 ** draw.uniform(13.5, 20.5))
      with small_disk(place, size + (64 << 10)) as mounted:
        if not mounted:
          yield Row("faults", "disk full", "not possible here")
          return
        name, argv, reading, what = _jobs(world, place)[index]
        first = door(name, *argv)
        _remount(place, "size=1g")
        whole = wholes[Path(what).name if name != "prepare" else name]
        result = _then_again(name, argv, reading, what, whole, first, place)
        yield Row("faults", "disk full", result, f"{number}: {name} in {size} bytes: {words(first)}")
  shutil.rmtree(world.root / "unused", ignore_errors=True)


def locked_folders(world: World) -> Iterator[Row]:
  """Read-only file systems, folders of somebody else, files in the place of folders, links to nothing."""
  wholes = _wholes(world)
  place = world.root / "locked"
  for index in range(5):
    with small_disk(place, 1 << 30) as mounted:
      if not mounted:
        yield Row("faults", "read-only", "not possible here")
        break
      name, argv, reading, what = _jobs(world, place)[index]
      _remount(place, "ro")
      first = door(name, *argv)
      _remount(place, "rw")
      whole = wholes[Path(what).name if name != "prepare" else name]
      result = _then_again(name, argv, reading, what, whole, first, place)
      yield Row("faults", "read-only", result, f"{name}: {words(first)}")
  for kind in ("a file in the place of a folder", "a link to nothing in the place of a folder", "no permission"):
    for index in range(5):
      shutil.rmtree(place, ignore_errors=True)
      name, argv, *_ = _jobs(world, place)[index]
      target, limits = place / ("data", "run", "model", "hf", "m.gguf")[index], Limits()
      if kind.startswith("a file"):
        target.write_text("mine")
      elif kind.startswith("a link"):
        target.symlink_to(place / "nothing" / "there")
      else:
        limits = Limits(modest=True)
        place.chmod(0o500)
      first = door(name, *argv, limits=limits)
      kept = not kind.startswith("a file") or target.read_text() == "mine"
      yield Row("faults", kind, first.verdict if kept else "overwritten", f"{name}: {words(first)}")
      place.chmod(0o700)
  shutil.rmtree(place, ignore_errors=True)


def closed_files(world: World) -> Iterator[Row]:
  """Files that may not be read, one by one."""
  place = world.root / "closed"
  for artifact, reading in ((world.data, readings.read_data), (world.model, readings.read_model)):
    shutil.rmtree(place, ignore_errors=True)
    job = write_job(place, world.corpus)
    target = place / ("data" if reading is readings.read_data else "model")
    shutil.copytree(artifact, target)
    whole = trial(reading, str(job if reading is readings.read_data else target))
    for path in sorted(path for path in target.rglob("*") if path.is_file() and path.name != "lock"):
      mode = path.stat().st_mode
      path.chmod(0)
      found = trial(reading, str(job if reading is readings.read_data else target), limits=Limits(modest=True))
      path.chmod(mode)
      result = "same" if found.verdict == "done" and found.out == whole.out else found.verdict
      if "delete" in found.err or "damaged" in found.err:
        result = f"wrong advice: {words(found)}"
      yield Row("faults", "a file that may not be read", result, f"{path.relative_to(target)}: {words(found)}")
  shutil.rmtree(place, ignore_errors=True)


def few_resources(world: World, rounds: int, seed: int) -> Iterator[Row]:
  """Few open files, small files only, little memory, nobody who reads the output."""
  draw, wholes = random.Random(f"{seed} resources"), _wholes(world)
  place = world.root / "limited"
  kinds = ["too many open files", "file too large", "no memory", "output to a full disk"]
  for number in range(rounds):
    for kind in kinds:
      for index in range(5):
        shutil.rmtree(place, ignore_errors=True)
        name, argv, reading, what = _jobs(world, place)[index]
        limits = {
          "too many open files": Limits(open_files=draw.randint(LEAST_FILES, LEAST_FILES + 40)),
          "file too large": Limits(file_bytes=int(2 ** draw.uniform(11, 17))),
          "no memory": Limits(memory_bytes=draw.randint(200, 6000) << 20),
          "output to a full disk": Limits(stdout="/dev/full"),
        }[kind]
        first = door(name, *argv, limits=limits)
        whole = wholes[Path(what).name if name != "prepare" else name]
        result = _then_again(name, argv, reading, what, whole, first, place)
        yield Row("faults", kind, result, f"{number}: {name}: {words(first)}")
  shutil.rmtree(place, ignore_errors=True)

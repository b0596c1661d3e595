"""Work that is killed with -9 at random moments and begun again: it ends as if it had not been killed."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torments import readings
from torments.corruptions import Row, leftovers, words
from torments.trials import trial
from torments.world import World, write_job


def kill(command: list[str], after_s: float) -> int | None:
  """Starts a command in a process group of its own and kills the group; its exit code, None where it was killed."""
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
  try:
    return process.wait(after_s)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return None


def _door(name: str, *argv: str) -> list[str]:
  return [sys.executable, "-m", f"jaxllm.{name}", *argv]


def until_done(command: list[str], draw: random.Random, seconds: float, kills: int) -> tuple[int, str]:
  """Kills a command up to `kills` times, each within `seconds` of its start, then lets it end; (kills, last words)."""
  done = 0
  for _ in range(kills):
    if kill(command, draw.uniform(0.2, seconds)) == 0:
      return done, ""
    done += 1
  last = subprocess.run(command, capture_output=True, text=True)
  return done, "" if last.returncode == 0 else last.stderr[-300:]


def tree_digest(folder: Path, but: Callable[[Path], bool]) -> str:
  """SHA-256 of the names and contents of a folder's files."""
  found = hashlib.sha256()
  for path in sorted(path for path in folder.rglob("*") if path.is_file() and not but(path)):
    found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
  return found.hexdigest()


def _prepared_bytes(data: Path) -> str:
  """Of what a build holds, whatever it is called; the manifest has the build's name."""
  (build,) = data.glob("build-*")
  return tree_digest(build, but=lambda path: path.name in ("lock", "manifest.json"))


def prepares(world: World, rounds: int, seed: int) -> Iterator[Row]:
  """Preparing with 1, 2 and 4 processes, killed and begun again: the same bytes."""
  whole = _prepared_bytes(world.data)
  draw = random.Random(f"{seed} prepare")
  for number in range(rounds):
    processes = (1, 2, 4)[number % 3]
    place = world.root / "killed-data"
    shutil.rmtree(place, ignore_errors=True)
    job = write_job(place, world.corpus)
    command = _door("prepare", f"--config={job}", f"--processes={processes}")
    started = time.monotonic()
    kills, failed = until_done(command, draw, 4.0, 4)
    same = not failed and _prepared_bytes(place / "data") == whole
    result = "same" if same else f"failed: {failed}" if failed else "other bytes"
    if same and (left := leftovers(place / "data")):
      result = f"left behind: {left[0]}"
    detail = f"{kills} kills in {time.monotonic() - started:.0f} s"
    yield Row("killed with -9", f"prepare, processes: {processes}", result, detail)
  shutil.rmtree(world.root / "killed-data", ignore_errors=True)


def _figures(run: Path) -> list[tuple]:
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return sorted(
    (line["step"], name, value) for line in lines for name, value in line.items() if name not in readings.TIMES
  )


def trains(world: World, rounds: int, seed: int) -> Iterator[Row]:
  """Training killed and resumed: every figure and weight of the unkilled run."""
  figures, model = _figures(world.run), trial(readings.read_model, str(world.run)).out
  draw = random.Random(f"{seed} train")
  for _ in range(rounds):
    run = world.root / "killed-run"
    shutil.rmtree(run, ignore_errors=True)
    command = _door("train", f"--config={world.config}", f"--workdir={run}")
    kills, failed = until_done(command, draw, 9.0, 4)
    same = not failed and _figures(run) == figures and trial(readings.read_model, str(run)).out == model
    result = "same" if same else f"failed: {failed}" if failed else "another run"
    yield Row("killed with -9", "train", result, f"{kills} kills")
  shutil.rmtree(world.root / "killed-run", ignore_errors=True)


def replaces(world: World, rounds: int, seed: int) -> Iterator[Row]:
  """A model directory that is being replaced by another one: under its name the old or the new, whole."""
  draw = random.Random(f"{seed} replace")
  place = world.root / "replaced"
  shutil.rmtree(place, ignore_errors=True)
  shutil.copytree(world.model, place)
  program = (
    "import sys, jaxllm, jax\n"
    f"model = jaxllm.load_model({str(world.model)!r})\n"
    "print('loaded', flush=True)\n"
    "for _ in range(100000): model.save(sys.argv[1])\n"
  )
  old = trial(readings.read_model, str(place)).out
  fresh = world.root / "saved"
  _save(world, fresh)
  new = trial(readings.read_model, str(fresh)).out
  shutil.rmtree(fresh)
  for number in range(rounds):
    process = subprocess.Popen(
      [sys.executable, "-c", program, str(place)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    process.stdout.readline()
    time.sleep(draw.uniform(0.05, 0.6))
    process.kill()
    process.wait()
    found = trial(readings.read_model, str(place))
    result = found.verdict
    if found.verdict == "done":
      result = "same" if found.out in (old, new) else "neither the old nor the new"
    yield Row("killed with -9", "replacing a model directory", result, f"{number}: {words(found)}")
  _save(world, place)
  left = leftovers(world.root)
  yield Row(
    "killed with -9",
    "what kills of a save left behind is gone after the next",
    f"left behind: {left[0]}" if left else "same",
  )
  shutil.rmtree(place, ignore_errors=True)


def _save(world: World, place: Path) -> None:
  program = f"import sys, jaxllm; jaxllm.load_model({str(world.model)!r}).save(sys.argv[1])"
  subprocess.run([sys.executable, "-c", program, str(place)], capture_output=True, check=True)

"""Files that are not as they were written: each is changed, cut, emptied, lost or exchanged, and read again.

Right is a refusal in one line, the same result (the file is not needed for it), or another good state that is said
(an older checkpoint). Another result without a word is a silent wrong load.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torments import readings
from torments.trials import Outcome, trial
from torments.world import World, write_job

FINE = ("refused", "same", "said", "stopped", "loaded", "finished", "not possible here")
SAID = ("using checkpoint step", "damaged", "is missing", "has changed", "has no manifest")


class Row(NamedTuple):
  """One trial for the table."""

  category: str
  what: str  # within the category
  result: str  # "refused", "same", "said", "done", "stopped", or a fault
  detail: str = ""

  @property
  def fault(self) -> bool:
    return self.result not in FINE


def changed(path: Path, draw: random.Random) -> str:
  """Changes a file in one of the ways that disks and people have; returns how."""
  data = path.read_bytes()
  ways = ["deleted", "emptied", "cut", "grown", "a directory", "a dangling link", "zeros"]
  way = draw.choice(ways + ["a bit"] * 5 + ["bytes"] * 3)
  if not data and way in ("cut", "a bit", "bytes", "zeros", "emptied"):
    way = "grown"
  if way == "grown":
    path.write_bytes(data + draw.randbytes(draw.randint(1, 40)))
  elif way == "cut":
    path.write_bytes(data[: draw.randrange(len(data))])
  elif way == "zeros":
    at = draw.randrange(len(data))
    path.write_bytes(data[:at] + b"\0" * len(data[at : at + 4096]) + data[at + 4096 :])
  elif way == "emptied":
    path.write_bytes(b"")
  elif way in ("a bit", "bytes"):
    at, now = draw.randrange(len(data)), bytearray(data)
    count = 1 if way == "a bit" else draw.randint(1, 8)
    for i in range(at, min(at + count, len(data))):
      now[i] ^= 1 << draw.randrange(8)
    path.write_bytes(now)
  else:
    path.unlink()
    if way == "a directory":
      path.mkdir()
    elif way == "a dangling link":
      path.symlink_to("nothing")
  return way


def _copy(source: Path, target: Path) -> Path:
  shutil.rmtree(target, ignore_errors=True)
  shutil.copytree(source, target)
  return target


def _files(folder: Path) -> list[Path]:
  return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def corrupt(world: World, count: int, seed: int) -> Iterator[Row]:
  """`count` changed copies of each artifact."""
  place = world.root / "changed"
  job = write_job(place, world.corpus)
  artifacts: list[tuple[str, Path, Path, Callable[..., int], Any]] = [
    ("prepared data", world.data, place / "data", readings.read_data, job),
    ("model directory", world.model, place / "model", readings.read_model, place / "model"),
    ("run directory, its model", world.run, place / "run", readings.read_model, place / "run"),
    ("run directory, resumed", world.run, place / "run", readings.resume, (str(world.config), str(place / "run"))),
  ]
  for name, source, copy, reading, argument in artifacts:
    _copy(source, copy)
    arguments = argument if isinstance(argument, tuple) else (str(argument),)
    whole = trial(reading, *arguments)
    if whole.verdict != "done":
      raise SystemExit(f"{name} cannot be read unchanged: {whole.err}")
    draw = random.Random(f"{seed} {name}")
    for _ in range(count):
      _copy(source, copy)
      path = draw.choice(_files(copy))
      if "checkpoints" in path.parts:  # else most would be an older checkpoint's, which is not read
        path = draw.choice(_files(max((copy / "checkpoints").glob("[0-9]*"), key=lambda step: int(step.name))))
      way = changed(path, draw)
      found = trial(reading, *arguments)
      yield Row("changed files", name, judged(found, whole), f"{path.relative_to(copy)}: {way}: {words(found)}")
  shutil.rmtree(place)


def judged(found: Outcome, whole: Outcome) -> str:
  """What a reading is beside that of the unchanged artifact."""
  if found.verdict != "done":
    return found.verdict
  if found.out == whole.out:
    return "same"
  return "said" if any(word in found.err for word in SAID) else "silent"


def words(outcome: Outcome) -> str:
  """The last that it said."""
  lines = [line for line in outcome.err.splitlines() if line.strip()]
  return lines[-1][:300] if lines else ""


def copied_steps(world: World) -> Iterator[Row]:
  """A checkpoint under another step's name, and a manifest of another step."""
  place = _copy(world.run, world.root / "changed-run")
  whole = trial(readings.read_model, str(place))
  steps = sorted((path for path in (place / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name))
  for new in (int(steps[-1].name) + 1, int(steps[-1].name) * 10):
    copy = place / "checkpoints" / str(new)
    shutil.copytree(steps[0], copy)
    found = trial(readings.read_model, str(place))
    yield Row("changed files", "a checkpoint's folder copied", judged(found, whole), words(found))
    shutil.rmtree(copy)
  for name in ("manifest.json", "data.json"):
    before = (steps[-1] / name).read_bytes()
    shutil.copyfile(steps[0] / name, steps[-1] / name)
    found = trial(readings.read_model, str(place))
    yield Row("changed files", "a file of another checkpoint", judged(found, whole), f"{name}: {words(found)}")
    (steps[-1] / name).write_bytes(before)
  shutil.rmtree(place)


def torn_metrics(world: World, count: int, seed: int) -> Iterator[Row]:
  """metrics.jsonl with lines that are torn, foreign, binary or no objects: the run goes on, and what goes is said."""
  from torments.trials import door

  draw = random.Random(f"{seed} metrics")
  odd = [b'{"step": 3, "lo', b"\xff\xfe\x00\x80", b"[1, 2]", b"null", b'{"a": 1}', b'{"step": "x"}', b"3", b"\0" * 512,
         b'{"step": 1e400}', b"[" * 5000, b'{"step": -1, "loss": NaN}', b"hello"]  # fmt: skip
  for number in range(count):
    place = _copy(world.run, world.root / "torn-run")
    path = place / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    for _ in range(draw.randint(1, 3)):
      lines.insert(draw.randrange(len(lines) + 1), draw.choice(odd))
    path.write_bytes(b"\n".join(lines) + (b"\n" if draw.random() < 0.7 else b""))
    done = door("train", f"--config={world.config}", f"--workdir={place}", "--config.training.steps=9")
    said = "metrics.jsonl" in done.err + done.out
    result = done.verdict if done.verdict != "done" else "said" if said else "silent"
    yield Row("changed files", "metrics.jsonl, then resumed", result, f"{number}: {words(done)}")
  shutil.rmtree(world.root / "torn-run", ignore_errors=True)


def leftovers(folder: Path) -> list[str]:
  """Temporary things that lie about in a folder."""
  names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
  return [name for name in names if os.path.basename(name).endswith((".tmp", ".partial", ".replaced"))]

"""Feeds every reader of files with what strangers, disks and networks make of them.

    python tools/fuzzing.py [--inputs=2000] [--seed=0] [READER ...]

Each input is a small real model, tokenizer, corpus or config (`fuzz_readers`) with one to three changes: in JSON values
of other types, missing, doubled or nested ones and numbers of any size; in all files flipped bits, cuts, and bytes put
in, taken out or repeated. It must be read, or refused by a `UserError` in one short printable line. Anything else is a
fault: another exception, a process that ends, over 5 s of computing, or over 1 GB of memory.

An input is named by reader, seed and number: `python tools/fuzzing.py --seed=S --only=N READER` runs that one alone,
with a traceback.
"""

import argparse
import collections
import copy
import dataclasses
import json
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HANG_SECONDS, PATIENCE = 5.0, 60.0  # of the processor; by the clock, on a machine that is busy
MEMORY = 1 << 30
MAX_MESSAGE = 500


@dataclasses.dataclass(frozen=True)
class Reader:
  """write: puts a sample into a directory. read: reads what stands there, all of it. changed: whether a file is."""

  write: Callable[[Path], None]
  read: Callable[[Path], Any]
  changed: Callable[[Path], bool] = lambda path: True


@dataclasses.dataclass
class Counts:
  """What became of the inputs of one reader."""

  loaded: int = 0
  refused: int = 0
  faults: list[str] = dataclasses.field(default_factory=list)


def fuzz(reader: str, inputs: int, seed: int = 0) -> Counts:
  """Runs a reader on so many inputs, in another process: one that is ended by an input is a fault and begun again.

  Args:
    reader: a name of `fuzz_readers.READERS`.
  """
  counts, done = Counts(), 0
  while done < inputs:
    for number, kind, text in _run(reader, seed, done, inputs):
      done = number + 1
      if kind == "fault":
        counts.faults.append(f"{reader} {seed} {number}: {text}")
      else:
        setattr(counts, kind, getattr(counts, kind) + 1)
  return counts


def _run(reader: str, seed: int, first: int, last: int) -> Iterator[tuple[int, str, str]]:
  """What becomes of each input, until the process ends."""
  command = [sys.executable, str(Path(__file__)), "--worker", f"--seed={seed}", f"--first={first}", reader]
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0"}
  with subprocess.Popen(
    [*command, f"--inputs={last}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, bufsize=0
  ) as process:
    assert process.stdout is not None
    poll, number = select.poll(), first - 1
    poll.register(process.stdout, select.POLLIN)
    while number + 1 < last:
      line = process.stdout.readline() if poll.poll(PATIENCE * 1000) else b"hang"
      if line == b"hang" or not line:
        process.kill()
        what = "it hangs" if line else f"the process ends with {process.wait()}"
        yield number + 1, "fault", what
        return
      number, kind, text = json.loads(line)
      yield number, kind, text
      if kind == "fault" and text.startswith("memory"):
        process.kill()
        return


def work(reader: Reader, name: str, seed: int, first: int, last: int, tell: Callable[..., None]) -> None:
  """Reads inputs one after the other and tells (number, kind, text) of each."""
  with tempfile.TemporaryDirectory(prefix="jaxllm-fuzz-") as place:
    directory = Path(place)
    reader.write(directory)
    reader.read(directory)  # as it is, it is no one's fault
    whole = {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    files = [path for path in whole if reader.changed(path)]
    for number in range(first, last):
      changed = mutate(files, whole, random.Random(f"{name} {seed} {number}"))
      kind, text = classify(reader, directory)
      tell(number, kind, text)
      for path in changed:
        path.write_bytes(whole[path])


def classify(reader: Reader, directory: Path) -> tuple[str, str]:
  """ "loaded", "refused" or "fault", and the error's text."""
  from jaxllm.base.errors import UserError

  Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: an older one would hide this one
  memory, begin = _peak(), time.process_time()
  try:
    reader.read(directory)
    kind, text = "loaded", ""
  except UserError as error:
    kind, text = "refused", str(error)
    if not text.isprintable() or len(text) > MAX_MESSAGE:
      kind, text = "fault", f"a message of {len(text)} characters: {ascii(text[:200])}"
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # Rust's panics are no Exceptions
    last = traceback.extract_tb(error.__traceback__)[-1]
    kind, text = (
      "fault",
      f"{type(error).__name__}: {ascii(str(error)[:200])} at {Path(last.filename).name}:{last.lineno}",
    )
  if time.process_time() - begin > HANG_SECONDS:
    kind, text = "fault", f"{time.process_time() - begin:.0f} s of computing, then {kind} {text[:100]}"
  if _peak() - memory > MEMORY:
    kind, text = "fault", f"memory: {_peak() - memory >> 20} MiB more"
  return kind, text


def _peak() -> int:
  return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


# Changes

NUMBERS = (0, 1, -1, 2, 3, 7, 0.5, -0.0, 1e-300, 1e300, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**12, 10**30, 10**400)
ODD = (
  *(None, True, False, "", "x", "1e9", "32", "NaN", "\0", "line\nbreak", "\x1b[31m", "\u202e", "a" * 5000, "../../x"),
  *("\U0001f600", "{}", "global", [], {}, [None], [0], [1, "a"], {"": {}}, {"type": None}, [[[[[]]]]]),
)
RAW = (
  "NaN",
  "Infinity",
  "-Infinity",
  "1e999",
  '"\\ud800"',
  "9" * 5000,
  "[" * 3000 + "]" * 3000,
  '{"a":1,"a":2}',
  "-",
  "",
)


def mutate(files: list[Path], whole: dict[Path, bytes], rng: random.Random) -> set[Path]:
  """Changes one to three things of the files, in place; returns which files."""
  changed = {path: whole[path] for path in rng.choices(files, k=rng.choice((1, 1, 1, 2, 3)))}
  for path, data in changed.items():
    value = None
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.75:
      value = _changed_json(data, rng)
    path.write_bytes(_changed_bytes(data, rng) if value is None else value)
  return set(changed)


def _changed_json(data: bytes, rng: random.Random) -> bytes | None:
  lines = data.splitlines() if b"\n{" in data else [data]
  chosen = rng.randrange(len(lines))
  try:
    value = json.loads(lines[chosen])
  except ValueError:
    return None
  raws: dict[str, str] = {}
  for _ in range(rng.choice((1, 1, 2, 3))):
    value = _changed_value(value, rng, raws)
  text = json.dumps(value)
  for mark, raw in raws.items():
    text = text.replace(json.dumps(mark), raw)
  lines[chosen] = text.encode()
  return b"\n".join(lines)


def _changed_value(value: Any, rng: random.Random, raws: dict[str, str]) -> Any:
  """The value with one node changed; a large list or table seldom in its inside."""
  places: list[tuple[Any, Any]] = []

  def collect(node: Any) -> None:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys if len(keys) <= 20 else rng.sample(list(keys), 5):
      places.append((node, key))
      collect(node[key])

  collect(value)
  if not places or rng.random() < 0.02:
    return _odd(value, rng, raws)
  node, key = rng.choice(places)
  action = rng.random()
  if action < 0.15:
    del node[key]
  elif action < 0.2 and isinstance(node, dict):
    node[str(_odd(key, rng, raws))[:200]] = node.pop(key)
  elif action < 0.27 and isinstance(node, list):
    node.insert(key, json.loads(json.dumps(node[key])))
  elif action < 0.32:
    other, where = rng.choice(places)  # a value from elsewhere
    node[key] = json.loads(json.dumps(other[where])) if _is_there(other, where) else None
  else:
    node[key] = _odd(node[key], rng, raws)
  return value


def _is_there(node: Any, key: Any) -> bool:
  return key in node if isinstance(node, dict) else key < len(node)


def _odd(value: Any, rng: random.Random, raws: dict[str, str]) -> Any:
  kind = rng.random()
  if isinstance(value, int | float) and not isinstance(value, bool) and kind < 0.5:
    return rng.choice(
      (
        *NUMBERS,
        value + 1,
        value - 1,
        value * 2,
        -value,
        f"{value:.1f}" if abs(value) < 1e300 else 0.0,
        str(value),
        [value],
      )
    )
  if isinstance(value, str) and kind < 0.3:
    return rng.choice((value * 2, value[:-1], value[::-1], value.upper(), value + "\n", [value], {"content": value}))
  if kind < 0.6:
    return rng.choice(NUMBERS)
  if kind < 0.93:
    return copy.deepcopy(rng.choice(ODD))
  mark = f"raw-{rng.random()}"
  raws[mark] = rng.choice(RAW)
  return mark


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
  text = bytearray(data)
  for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
    # Half of the changes are near the beginning, where binary files have their headers.
    at = rng.randrange(max(1, len(text) if rng.random() < 0.5 else min(len(text), 200)))
    action = rng.randrange(8)
    if action <= 2 and text:
      text[at] ^= 1 << rng.randrange(8)
    elif action == 3 and text:
      text[at] = rng.choice((0, 0xFF, 0x7F, 0x80, ord("{"), ord('"'), ord("(")))
    elif action == 4:
      del text[at : at + rng.choice((1, 2, 8, 100))]
    elif action == 5:
      text[at:at] = rng.choice((rng.randbytes(rng.choice((1, 4, 16))), b"\0" * 8, b"\xff" * 8, b"[" * 200, b"\n"))
    elif action == 6:
      text[at : at + 8] = rng.choice((2**63 - 1, 2**64 - 1, 2**32, 0, 1 << 40)).to_bytes(8, "little")
    else:
      text[at:at] = text[at : at + rng.choice((1, 8, 64, 1000))] * rng.choice((1, 2, 50))
  return bytes(text[: rng.randrange(len(text) + 1)] if rng.random() < 0.1 else text)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("readers", nargs="*", metavar="READER")
  parser.add_argument("--inputs", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
  parser.add_argument("--only", type=int)
  parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker or args.only is not None:
    from fuzz_readers import READERS

    name = args.readers[0]
    if args.only is not None:
      return _only(READERS[name], name, args.seed, args.only)
    work(READERS[name], name, args.seed, args.first, args.inputs, lambda *what: print(json.dumps(what), flush=True))
    return 0
  names = args.readers or _names()
  faults = 0
  for name in names:
    counts = fuzz(name, args.inputs, args.seed)
    print(f"{name}: {counts.loaded} loaded, {counts.refused} refused, {len(counts.faults)} faults", flush=True)
    kinds = collections.Counter(fault.split(": ", 1)[1] for fault in counts.faults)
    first = {fault.split(": ", 1)[1]: fault for fault in reversed(counts.faults)}
    for kind, count in kinds.most_common():
      print(f"  {count} x {first[kind]}", flush=True)
    faults += len(counts.faults)
  return 1 if faults else 0


def _names() -> list[str]:
  from fuzz_readers import READERS

  return list(READERS)


def _only(reader: Reader, name: str, seed: int, number: int) -> int:
  with tempfile.TemporaryDirectory(prefix="jaxllm-fuzz-") as place:
    reader.write(Path(place))
    whole = {path: path.read_bytes() for path in sorted(Path(place).rglob("*")) if path.is_file()}
    files = [path for path in whole if reader.changed(path)]
    for path in mutate(files, whole, random.Random(f"{name} {seed} {number}")):
      data = path.read_bytes()
      print(path.name, data[:1500] if len(data) < 4000 else f"{len(data)} bytes", file=sys.stderr)
    print(reader.read(Path(place)))
  return 0


if __name__ == "__main__":
  sys.exit(main())

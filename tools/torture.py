"""Kills, corrupts and starves jaxllm, and writes down what happened: docs/reliability.md has its table.

  python tools/torture.py --record       # the recorded run, about an hour
  python tools/torture.py --scale=0.1    # a tenth of it
  python tools/torture.py --only=faults --seed=7

Everything happens to a tiny model in a new folder, which goes afterwards. Full and read-only disks need a user who may
mount one (root in a container with that capability); where that is not possible the table says so.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sides

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "reliability.md"
RECORD = ROOT / "experiments" / "benchmarks" / "torture.json"
HEAD = "| what | trials | refused in a line | as if nothing were | other state, said | faults |"
COLUMNS = {"refused": 0, "stopped": 0, "same": 1, "finished": 1, "loaded": 1, "said": 2}


def torments(scale: float) -> dict[str, Callable]:
  """Name -> what yields its rows from (world, seed); `scale` says how many, 1 for the recorded run."""
  from fuzz_readers import READERS
  from torments import corruptions, faults, fuzzes, interrupts, kills

  def times(count: int) -> int:
    return max(1, round(count * scale))

  return {
    "changed files": lambda world, seed: corruptions.corrupt(world, times(100), seed),
    "copied checkpoints": lambda world, _: corruptions.copied_steps(world),
    "torn metrics": lambda world, seed: corruptions.torn_metrics(world, times(40), seed),
    "killed: prepare": lambda world, seed: kills.prepares(world, times(6), seed),
    "killed: train": lambda world, seed: kills.trains(world, times(8), seed),
    "killed: replacing": lambda world, seed: kills.replaces(world, times(40), seed),
    "interrupted": lambda world, seed: interrupts.interrupted(world, times(12), seed),
    "faults: disk full": lambda world, seed: faults.full_disks(world, times(6), seed),
    "faults: closed": lambda world, _: faults.locked_folders(world),
    "faults: files": lambda world, _: faults.closed_files(world),
    "faults: resources": lambda world, seed: faults.few_resources(world, times(3), seed),
    **{f"fuzz: {name}": lambda _, seed, name=name: fuzzes.fuzzed(name, times(2000), seed) for name in READERS},
  }


def table(rows: list) -> list[str]:
  """Markdown: how many of each kind ended how."""
  lines = [HEAD, "|---" * HEAD.count("|", 1) + "|"]
  groups = collections.defaultdict(list)
  for row in rows:
    groups[row.category, row.what].append(row)
  for (category, what), group in groups.items():
    counts = [0] * 3
    if all(row.result == "not possible here" for row in group):
      lines.append(f"| {category}: {what} | not possible here | | | | |")
      continue
    for row in group:
      if not row.fault:
        counts[COLUMNS[row.result]] += 1
    faults = sum(row.fault for row in group)
    cells = [str(count or "") for count in counts]
    lines.append(f"| {category}: {what} | {len(group)} | {' | '.join(cells)} | {faults} |")
  return lines


def torture(root: Path, scale: float, only: str, seed: int, say: Callable[[str], None]) -> Iterator:
  """Rows of all torments whose name begins with `only`."""
  from torments import world

  say("making a model to torture …")
  made = world.build(root)
  for name, torment in torments(scale).items():
    if name.startswith(only):
      started, count = time.monotonic(), 0
      for row in torment(made, seed):
        count += 1
        if row.fault:
          say(f"FAULT {row.category}: {row.what}: {row.result}: {row.detail}")
        yield row
      say(f"{name}: {count} trials in {time.monotonic() - started:.0f} s")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--scale", type=float, default=1.0, help="how many trials, 1 for the recorded run")
  parser.add_argument("--only", default="", metavar="NAME", help="the torments whose name begins so")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--record", action="store_true", help=f"write {TABLE.name} and {RECORD.name}")
  args = parser.parse_args()
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")])
  root, started, rows = Path(tempfile.mkdtemp(prefix="torture-")), time.monotonic(), []
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
  root.chmod(0o755)
  try:
    for row in torture(root / "world", args.scale, args.only, args.seed, say=_say):
      rows.append(row)
  finally:
    shutil.rmtree(root, ignore_errors=True)
  lines, faults = table(rows), [row for row in rows if row.fault]
  print("\n".join(lines))
  if args.record:
    _record(lines, rows, args, time.monotonic() - started)
  print(f"{len(rows)} trials, {len(faults)} faults")
  return 1 if faults else 0


def _record(lines: list[str], rows: list, args: argparse.Namespace, seconds: float) -> None:
  """Writes the page and the record; those of some torments only (--only) go in the place of what was there of them."""
  machine = sides.machine()
  facts = machine | {"only": args.only, "seed": args.seed, "scale": args.scale}
  facts |= {"seconds": round(seconds), "trials": len(rows)}
  title = "## What was tried"
  text, _, old = TABLE.read_text().partition(title) if TABLE.exists() else ("# Reliability\n\n", "", "")
  kept = {"runs": [], "rows": []} if not args.only else json.loads(RECORD.read_text())
  new = [(row.category, row.what) for row in rows]
  faults = [row for row in kept["rows"] if (row["category"], row["what"]) not in new]
  faults += [row._asdict() for row in rows if row.fault]
  there = {line.split("|")[1]: line for line in old.splitlines() if args.only and line.startswith("|")}
  there |= {line.split("|")[1]: line for line in lines}
  runs = [*kept["runs"], facts]
  page = [title, "", *there.values(), "", *map(_where, runs)]
  if faults:
    page += [
      "",
      "Faults:",
      "",
      *(f"- {row['category']}: {row['what']}: {row['result']}: {row['detail']}" for row in faults),
    ]
  TABLE.write_text(text + "\n".join(page) + "\n")
  RECORD.write_text(json.dumps({"runs": runs, "rows": faults}, indent=1) + "\n")


def _where(run: dict) -> str:
  only = f" --only={run['only']!r}" if run["only"] else ""
  command = f"`python tools/torture.py --record{only} --scale={run['scale']:g} --seed={run['seed']}`"
  where = f"- {command}: {run['trials']:,} trials in {run['seconds'] / 60:.0f} minutes"
  return f"{where} on {run['machine']}, commit {run['commit'][:9]}."


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  sys.exit(main())

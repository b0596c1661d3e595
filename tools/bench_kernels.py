"""Every kernel beside everybody else who computes the same, on the device at hand: first is it right, then how fast.

    python tools/bench_kernels.py --quick               # an H100 in ten minutes: the main checks and the targets
    python tools/bench_kernels.py                       # all checks, the targets, then all shapes of this chip
    python tools/bench_kernels.py --ops=attention --out=experiments/benchmarks/kernels_h200
    python tools/bench_kernels.py --list                # what would run

Checks (tools/kernel_checks.py) compare results and gradients with float64, with NaN where nobody may look, and want the
same bits again. Then each side runs on the same random inputs, more of them than caches hold, one set after another;
its error is against float64 on a part of the result and against our plain form in float32 on all of it. Times are
medians of at least 20 calls (--calls), twice, compilation excluded; on NVIDIA they are the own time of the kernels
(CUPTI) and `clock ms` has the gaps between them, elsewhere the wall clock of a call. Percentages are of what this
device was measured to do in the same run: a matrix product and a copy.

All of it runs in a child process: what crashes, hangs (--timeout) or runs out of memory is a row that says so, and the
rest goes on. OUT.json is written after every row; the next run of the same sources and device goes on from there
(--fresh starts again, --resume=FILE goes on from a file elsewhere), so a long table may take several calls with
--budget=SECONDS. Writes OUT.json and OUT.png.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))
import bench_worker
import isolate

from jaxllm.kernels.backends import BACKENDS, TARGETS

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("bench_table.py")


# ---------------------------------------------------------------- verdicts


def judge(target, record: dict) -> dict:
  """PASS or MISSED with the figure, or why there is none."""
  said = {"target": target.name, "asked": target.asked, "at most": target.at_most}
  rows = {(row["op"], row.get("case"), row.get("side")): row for row in record["rows"]}

  def look(key, case, side):
    row = rows.get((case.op, case.name, side), {"missing": "was not run"})
    for reason in ("failed", "refused", "missing"):
      if reason in row:
        raise LookupError(f"{side}: {row[reason]}")
    if side.startswith("jaxllm") and (wrong := suspicious(row)):
      raise LookupError(f"{side}: {wrong}")
    return min(row[key]) if key == "ms" else row[key]

  try:
    figure = target.figure(
      lambda case, side: look("ms", case, side), lambda case, side: look("temp bytes", case, side), record["ceilings"]
    )
  except (LookupError, TypeError) as error:
    return said | {"verdict": "NO FIGURE", "reason": str(error)}
  passed = figure <= target.asked if target.at_most else figure >= target.asked
  return said | {"verdict": "PASS" if passed else "MISSED", "figure": figure}


def suspicious(row: dict) -> str | None:
  """What is wrong with a result, or None: errors far above what 16 bits explain, or other bits the second time."""
  if row.get("side", "").startswith("dense"):  # times the weight as it was before it was quantized
    return None
  for against, error in row.get("errors", {}).items():
    rounded = against != "float32" and "dynamic" in row["case"]  # whose activations the oracle does not round
    if not error < (0.1 if rounded else 0.02):
      return f"WRONG, error {error:.2g} ({against})"
  return "OTHER BITS when called again" if row.get("same again") is False else None


# ---------------------------------------------------------------- what runs, in which order


def jobs(table, target: str, args) -> list[dict]:
  """Checks, then what the targets need, then the rest."""
  family = TARGETS[target]
  ops = [op for op in args.ops.split(",") if op]
  words = [word for word in args.sides.split(",") if word]
  first = [(case, side) for t in table.targets(family) for case in t.cases for side in t.sides]
  every = [(case, side) for case in table.cases(family) for side in bench_worker.sides(case, target)]
  pairs = {(case.op, case.name, side): case for case, side in first + ([] if args.quick else every)}
  found = [
    {"do": "check", "op": check.op, "name": check.name, "backend": backend}
    for check in table.checks(target)
    for backend in BACKENDS.get(check.op, {}).get(family, ("xla",))
    if backend != "xla" and (check.quick or not args.quick)
  ]
  found += [{"do": "side", "op": op, "case": case, "side": side} for op, case, side in pairs]
  return [
    job
    for job in found
    if (not ops or job["op"].removesuffix(" backward") in ops or job["op"] in ops)
    and args.match in job.get("case", job.get("name"))
    and (not words or any(word in job.get("side", job.get("backend", "")) for word in words))
  ]


def key(job: dict) -> tuple:
  """By which a row is found again."""
  return tuple(job.get(name) for name in ("op", "case", "side", "name", "backend"))


class Bench:
  """Runs jobs in a child, one row each."""

  def __init__(self, table_file: Path, calls: int, timeout: float):
    command = [sys.executable, str(Path(__file__).with_name("bench_worker.py")), str(table_file), str(calls)]
    self.child, self.timeout = isolate.Child(command), timeout

  def row(self, job: dict) -> dict:
    """What became of a job. One whose child dies is tried once more in a new one, unless it was the first there: what
    an earlier job did to the memory must not be held against it."""
    fresh = self.child.process is None
    try:
      answer = self.child.ask(job, self.timeout)
    except isolate.Lost as lost:
      answer = {"failed": str(lost), "lost": True}
    if answer.pop("poisoned", False):
      self.child.close()
      answer["lost"] = True
    if answer.pop("lost", False) and not fresh and "no answer" not in answer["failed"]:
      return self.row(job)
    return answer


def sources() -> str:
  """A hash of all that a figure depends on."""
  h = hashlib.sha256()
  kernels = (path for path in (ROOT / "jaxllm" / "kernels").rglob("*") if path.suffix in (".py", ".cc", ".h", ".json"))
  tools = (
    path for name in ("bench_*.py", "kernel_c*.py", "kernel_cases/*.py") for path in Path(__file__).parent.glob(name)
  )
  for path in sorted([*kernels, *tools]):
    h.update(path.name.encode() + path.read_bytes())
  return h.hexdigest()[:16]


# ---------------------------------------------------------------- what is written


def commit() -> str:
  """The commit that is checked out, "+changes" if files differ from it; empty outside git."""
  run = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()  # noqa: E731
  return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "-uno") else "")


def earlier(path: Path, same: dict) -> dict:
  """The record at `path` if it is of the same sources and device, else an empty one."""
  if path.exists():
    record = json.loads(path.read_text())
    if all(record.get(name) == value for name, value in same.items()):
      print(f"goes on from {len(record['rows'])} rows of {path}")
      return record
  return {"ceilings": {}, "rows": []}


def write(record: dict, path: Path) -> None:
  """All rows so far, or the file as it was: nothing in between."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(path.name + ".new")
  new.write_text(json.dumps(record, indent=1) + "\n")
  os.replace(new, path)


def rate(row: dict, case, limits: dict) -> None:
  """Adds what follows from a time."""
  seconds = min(row["ms"]) * 1e-3
  row |= {"TFLOP/s": case.flops / seconds / 1e12, "GB/s": case.bytes / seconds / 1e9}
  if limits:
    peak = limits.get(f"{case.dtype} FLOP/s") or limits["bfloat16 FLOP/s"]
    row["% of FLOP/s"] = 100 * case.flops / seconds / peak
    row["% of bytes/s"] = 100 * case.bytes / seconds / limits["bytes/s"]


def said(row: dict) -> str:
  """A row's line."""
  name = f"{row['op']:20} {row.get('case', row.get('name')):52} {row.get('side', row.get('backend')):20}"
  if reason := row.get("refused"):
    return f"{name} refused: {reason}"
  if reason := row.get("failed"):
    return f"{name} FAILED: {reason}"
  if "right" in row:
    verdict = "right" if row["right"] else "WRONG" if row["share of tolerance"] > 1 else "OTHER BITS when called again"
    return f"{name} {verdict}, {row['share of tolerance']:.2f} of the tolerance"
  text = f"{name} {min(row['ms']):9.4f} ms {row['TFLOP/s']:7.1f} TFLOP/s {row['GB/s']:6.0f} GB/s"
  if "% of FLOP/s" in row:
    text += f" ({row['% of FLOP/s']:.0f}% and {row['% of bytes/s']:.0f}%)"
  text += "".join(f"  error {error:.1e} ({against})" for against, error in row.get("errors", {}).items())
  return text + (f"  {wrong}" if (wrong := suspicious(row)) else "")


def plot(rows, title, path):
  """Each case's sides as bars of time relative to the fastest."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  timed = [row for row in rows if "ms" in row]
  names = list(dict.fromkeys((row["op"], row["case"]) for row in timed))
  sides = list(dict.fromkeys(row["side"] for row in timed))
  figure, axes = plt.subplots(figsize=(11, 1.5 + 0.16 * len(timed) + 0.25 * len(names)))
  place, ticks = 0.0, []
  for op, case in names:
    here = [row for row in timed if (row["op"], row["case"]) == (op, case)]
    best = min(min(row["ms"]) for row in here)
    ticks.append((place + (len(here) - 1) / 2, f"{op}\n{case}"))
    for row in here:
      ratio = min(row["ms"]) / best
      axes.barh(place, ratio, color=f"C{sides.index(row['side']) % 10}")
      axes.text(min(ratio, 10), place, f" {row['side']} {min(row['ms']):.3g} ms", va="center", fontsize=6)
      place += 1
    place += 1.5
  axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=6)
  axes.invert_yaxis()
  axes.set_xlabel("times the fastest")
  axes.set_xlim(0, min(axes.get_xlim()[1] * 1.3, 12))
  axes.set_title(title, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def finish(record: dict, table, out: Path) -> None:
  """The verdicts, the file and the picture."""
  record["targets"] = [judge(target, record) for target in table.targets(TARGETS[record["target"]])]
  write(record, out.with_suffix(".json"))
  for verdict in record["targets"]:
    figure = f"{verdict['figure']:.4g}" if "figure" in verdict else verdict["reason"]
    sign = "at most" if verdict["at most"] else "at least"
    print(f"{verdict['verdict']:9} {verdict['target']}: {figure} (asked: {sign} {verdict['asked']:g})")
  bad = [row for row in record["rows"] if "failed" in row or row.get("right") is False or suspicious(row)]
  print(f"{len(record['rows'])} rows, {len(bad)} of them failed or wrong")
  for row in bad:
    print(f"  {said(row)}")
  title = f"{record['device']} ({record['processor']}), jax {record['versions']['jax']}, {record['commit'][:8]}"
  if importlib.util.find_spec("matplotlib") and any("ms" in row for row in record["rows"]):
    plot(record["rows"], title, out.with_suffix(".png"))
    print(f"wrote {out}.json and .png")
  else:
    print(f"wrote {out}.json; no picture without matplotlib or times")


def arguments():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--quick", action="store_true", help="only the main checks and what the targets need")
  parser.add_argument("--ops", default="", help="comma list; default: all")
  parser.add_argument("--sides", default="", help="comma list of words that a side's name has; default: all")
  parser.add_argument("--match", default="", help="only cases and checks whose name has this")
  parser.add_argument("--calls", type=int, default=20)
  parser.add_argument("--timeout", type=float, default=None, help="seconds of a job; default: 90, on a CPU 600")
  parser.add_argument("--budget", type=float, default=None, help="seconds after which no job starts; --quick: 540")
  parser.add_argument("--out", default=None, help="without ending; default: experiments/benchmarks/kernels_CHIP")
  parser.add_argument("--resume", default=None, help="the file of an earlier run to go on from; default: OUT.json")
  parser.add_argument("--fresh", action="store_true", help="forget what an earlier run has measured")
  parser.add_argument("--table", default=TABLE, help="a Python file with cases, checks and targets")
  parser.add_argument("--list", action="store_true", help="only say what would run")
  return parser.parse_args()


def main():
  args = arguments()
  jax.config.update("jax_platforms", "cpu")  # this process only looks at shapes; the device is the child's
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is ended too
  start = time.monotonic()
  budget = args.budget or (540 if args.quick else float("inf"))
  table = bench_worker.load(str(args.table))
  bench = Bench(args.table, args.calls, 60)
  try:
    facts = bench.child.ask({"do": "facts"}, 60)
    bench.timeout = args.timeout or (600 if facts["target"] == "cpu" else 90)
    todo = jobs(table, facts["target"], args)
    if not todo or args.list:
      raise SystemExit("\n".join(" ".join(str(part) for part in key(job) if part) for job in todo) or "nothing to do")
    out = Path(args.out or f"experiments/benchmarks/kernels_{facts['target']}")
    same = facts | {"sources": sources(), "calls": args.calls}
    record = (
      {"ceilings": {}, "rows": []} if args.fresh else earlier(Path(args.resume or out.with_suffix(".json")), same)
    )
    record |= same | {"commit": commit(), "date": datetime.date.today().isoformat()}
    record["command"] = "python " + " ".join(sys.argv)
    if not record["ceilings"]:
      found = bench.row({"do": "ceilings"})
      if "failed" in found:
        raise SystemExit(f"the device does not compute: {found['failed']}")
      record["ceilings"] = found
    print(f"{facts['device']}: " + ", ".join(f"{k} {v:.3g}" for k, v in record["ceilings"].items()), flush=True)
    cases = {(case.op, case.name): case for case in table.cases(TARGETS[facts["target"]])}
    done = {key(row) for row in record["rows"]}
    for i, job in enumerate(todo):
      if key(job) in done:
        continue
      if time.monotonic() - start > budget:
        print(f"{len(todo) - i} jobs are left for the next run: the budget of {budget:.0f} s is used up")
        break
      row = {name: value for name, value in job.items() if name != "do"} | bench.row(job)
      if "ms" in row:
        rate(row, cases[job["op"], job["case"]], record["ceilings"])
      record["rows"].append(row)
      write(record, out.with_suffix(".json"))
      print(said(row), flush=True)
    finish(record, table, out)
  finally:
    bench.child.close()


if __name__ == "__main__":
  main()

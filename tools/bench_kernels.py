"""Every kernel beside everybody else who computes the same, on the device at hand.

    python tools/bench_kernels.py                       # all ops, the shapes of this chip
    python tools/bench_kernels.py --ops=attention --out=experiments/benchmarks/kernels_h200
    python tools/bench_kernels.py --list                # what would run

Each side runs on the same random inputs; its error is against float64 on a part of the result. Times are medians of at
least 20 calls (--calls), twice; on NVIDIA they are the own time of the kernels (CUPTI), elsewhere the wall clock of a
call. Percentages are of what this device was measured to do in the same run: a matrix product and a copy. Writes
OUT.json and OUT.png.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import Case, cases, installed

from jaxllm.errors import UserError
from jaxllm.kernels.backends import TARGETS, target_from_device_kind

REPEATS = 2


def timer(calls: int):
  """(function, arguments) -> milliseconds of so many calls."""
  if jax.default_backend() == "gpu":
    from jax.experimental.mosaic.gpu import profiler

    def on_gpu(run, arguments):
      _, times = profiler.measure(run, iterations=calls)(*arguments)
      return list(times)

    return on_gpu

  def by_the_clock(run, arguments):
    times = []
    for _ in range(calls):
      start = time.perf_counter()
      jax.block_until_ready(run(*arguments))
      times.append((time.perf_counter() - start) * 1e3)
    return times

  return by_the_clock


def torch_timer(function, arguments, device, calls):
  """Milliseconds of so many calls of a torch function on the same numbers."""
  import torch

  with torch.no_grad():
    tensors = [torch.from_dlpack(jax.dlpack.to_dlpack(x)) if device != "cpu" else _to_torch(x) for x in arguments]
    for _ in range(3):
      function(*tensors)
    times = []
    for _ in range(calls):
      if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(*tensors)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
      else:
        start = time.perf_counter()
        function(*tensors)
        times.append((time.perf_counter() - start) * 1e3)
  return times


def _to_torch(x):
  import torch

  return torch.from_numpy(np.asarray(x.astype(jnp.float32)).copy()).to(getattr(torch, jnp.dtype(x.dtype).name))


def ceilings(target, measure) -> dict[str, float]:
  """What this device does at best, measured now: FLOP/s of a square product, bytes/s of a copy."""
  small = TARGETS[target] == "cpu"
  found = {}
  n, dtypes = (2048, ("float32", "bfloat16")) if small else (8192, ("bfloat16",))
  for dtype in dtypes:
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    run = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(run(a, b))
    found[f"{dtype} FLOP/s"] = 2 * n**3 / (statistics.median(measure(run, (a, b))) * 1e-3)
  x = jax.random.normal(jax.random.key(0), ((64 if small else 512) << 20,), jnp.bfloat16)
  run = jax.jit(lambda x: -x)
  jax.block_until_ready(run(x))
  found["bytes/s"] = 2 * x.nbytes / (statistics.median(measure(run, (x,))) * 1e-3)
  return found


def error_of(case: Case, inputs, result) -> float | None:
  """Root mean square of the error over that of the truth, on the part that the oracle computes."""
  if case.oracle is None or (pair := case.oracle(inputs, result)) is None:
    return None
  got, want = pair
  return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


def run_case(case: Case, target: str, calls: int, measure, limits, only) -> list[dict]:
  """A row for each side that can run here."""
  inputs = case.values()
  sides = {f"jaxllm {name}": case.ours(name, target) for name in case.backends} | case.others
  rows = []
  for name, function in sides.items():
    if only and not any(word in name for word in only):
      continue
    row = {"op": case.op, "case": case.name, "side": name}
    try:
      run = jax.jit(function)
      result = jax.block_until_ready(run(*inputs))
      row["error"] = error_of(case, inputs, result)
      medians = [statistics.median(measure(run, inputs)) for _ in range(REPEATS)]
    except (UserError, ImportError, NotImplementedError, ValueError, RuntimeError, TypeError) as error:
      row["refused"] = str(error).strip().split("\n")[0][:160]
      rows.append(row)
      continue
    _rate(row, case, medians, limits)
    rows.append(row)
  if case.torch is not None and installed("torch"):
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cpu" or torch.cuda.is_available():
      row = {"op": case.op, "case": case.name, "side": f"torch {torch.__version__}"}
      medians = [statistics.median(torch_timer(case.torch, inputs, device, calls)) for _ in range(REPEATS)]
      _rate(row, case, medians, limits)
      rows.append(row)
  return rows


def _rate(row, case, medians, limits):
  seconds = min(medians) * 1e-3
  row |= {"ms": medians, "TFLOP/s": case.flops / seconds / 1e12, "GB/s": case.bytes / seconds / 1e9}
  peak = limits.get(f"{case.dtype} FLOP/s") or limits["bfloat16 FLOP/s"]
  row["% of FLOP/s"] = 100 * case.flops / seconds / peak
  row["% of bytes/s"] = 100 * case.bytes / seconds / limits["bytes/s"]


def plot(rows, title, path):
  """One panel an op: each case's sides as bars of time relative to the fastest."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  timed = [row for row in rows if "ms" in row]
  names = list(dict.fromkeys((row["op"], row["case"]) for row in timed))
  sides = list(dict.fromkeys(row["side"] for row in timed))
  figure, axes = plt.subplots(figsize=(11, 1 + 0.16 * len(timed) + 0.25 * len(names)))
  place, ticks = 0.0, []
  for op, case in names:
    here = [row for row in timed if (row["op"], row["case"]) == (op, case)]
    best = min(min(row["ms"]) for row in here)
    ticks.append((place + (len(here) - 1) / 2, f"{op}\n{case}"))
    for row in here:
      ratio = min(row["ms"]) / best
      axes.barh(place, ratio, color=f"C{sides.index(row['side']) % 10}")
      axes.text(ratio, place, f" {row['side']} {min(row['ms']):.3g} ms", va="center", fontsize=6)
      place += 1
    place += 1.5
  axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks], fontsize=6)
  axes.invert_yaxis()
  axes.set_xlabel("times the fastest")
  axes.set_xlim(0, min(axes.get_xlim()[1] * 1.3, 12))
  axes.set_title(title, fontsize=8)
  figure.tight_layout()
  figure.savefig(path, dpi=120)


def versions() -> dict[str, str]:
  from importlib import metadata

  names = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "libtpu", "torch", "tokamax")
  found = {}
  for name in names:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found | {"python": platform.python_version()}


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--ops", default="", help="comma list; default: all")
  parser.add_argument("--sides", default="", help="comma list of words that a side's name has; default: all")
  parser.add_argument("--match", default="", help="only cases whose name has this")
  parser.add_argument("--calls", type=int, default=20)
  parser.add_argument("--out", default=None, help="without ending; default: experiments/benchmarks/kernels_CHIP")
  parser.add_argument("--list", action="store_true", help="only say what would run")
  args = parser.parse_args()
  device = jax.devices()[0]
  target = target_from_device_kind(device.platform, device.device_kind)
  ops = [op for op in args.ops.split(",") if op]
  chosen = [c for c in cases(TARGETS[target]) if (not ops or c.op in ops) and args.match in c.name]
  if not chosen:
    raise SystemExit(f"no case of {args.ops!r} that matches {args.match!r}")
  if args.list:
    raise SystemExit("\n".join(f"{case.op}: {case.name}" for case in chosen))
  measure = timer(args.calls)
  limits = ceilings(target, measure)
  print(f"{device.device_kind} ({target}): " + ", ".join(f"{k} {v:.3g}" for k, v in limits.items()), flush=True)
  rows = []
  for case in chosen:
    for row in run_case(case, target, args.calls, measure, limits, [word for word in args.sides.split(",") if word]):
      rows.append(row)
      said = row.get("refused") or (
        f"{min(row['ms']):9.4f} ms {row['TFLOP/s']:7.1f} TFLOP/s ({row['% of FLOP/s']:3.0f}%) "
        f"{row['GB/s']:7.0f} GB/s ({row['% of bytes/s']:3.0f}%)"
        + (f"  error {row['error']:.1e}" if row.get("error") is not None else "")
      )
      print(f"{row['op']:24} {row['case']:52} {row['side']:22} {said}", flush=True)
  commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
  record = {
    "device": device.device_kind,
    "target": target,
    "cores": os.cpu_count(),
    "versions": versions(),
    "commit": commit,
    "date": datetime.date.today().isoformat(),
    "command": "python " + " ".join(sys.argv),
    "ceilings": limits,
    "rows": rows,
  }
  out = Path(args.out or f"experiments/benchmarks/kernels_{target}")
  out.parent.mkdir(parents=True, exist_ok=True)
  out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
  if installed("matplotlib"):
    plot(rows, f"{device.device_kind}, jax {jax.__version__}, {commit[:8]}", out.with_suffix(".png"))
  print(f"wrote {out}.json and .png")


if __name__ == "__main__":
  main()

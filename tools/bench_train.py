"""Our training step on the CPU beside the same model in PyTorch: alternating rounds in one run, medians, ratios.

  python tools/bench_train.py                                   float32, torch eager and compiled
  python tools/bench_train.py --dtype=bfloat16 --python-jax=.venv312/bin/python --python-torch=.venv/bin/python
  python tools/bench_train.py --torch= --without=matmul --without=attention     what each lever gives

The jax side is the package's own compiled step (`jaxllm.training.compile.make_program`), the torch side a
hand-written model with SDPA, fused rms_norm and fused AdamW. Both start from the same weights and see the same
tokens; their losses are compared. `--without` adds a jax process with one lever off: matmul, attention,
cross_entropy, elementwise (each on plain XLA), unroll (layers in a loop), resident (memory given back to the
system between steps), or all. Rounds during which other programs used the processor are left out.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

SIDES = pathlib.Path(__file__).with_name("train_sides")
SHAPE = dict(vocab=4096, embed=384, layers=6, heads=6, mlp=1024, length=256, batch=12)
LEVERS = ("matmul", "attention", "cross_entropy", "elementwise", "unroll", "resident")


def machine_seconds() -> float:
  """CPU seconds that all processes of this machine have used (Linux)."""
  fields = [int(x) for x in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
  return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
  """The processor's name, with the features that decide its speed (Linux)."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  facts = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
  facts = {key.strip(): value.strip() for key, value in facts.items()}
  features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
  return f"{facts.get('model name', platform.machine())} ({', '.join(features)})"


class Side:
  """One framework in its own process, idle on a pipe while another one runs."""

  def __init__(self, name: str, python: str, script: str, settings: dict):
    self.name, self.rounds, self.losses, self.foreign = name, [], [], []
    command = [python, str(SIDES / script), json.dumps(settings)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(SIDES.parent.parent)}
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    self.version = json.loads(self.process.stdout.readline())

  def own_seconds(self) -> float:
    fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def run(self, steps: int, record: bool = True) -> None:
    began, others = time.perf_counter(), machine_seconds() - self.own_seconds()
    self.process.stdin.write(f"{steps}\n")
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
    answer = json.loads(line)
    self.losses += answer["losses"]
    if record:
      self.rounds.append(answer["times"])
      self.foreign.append((machine_seconds() - self.own_seconds() - others) / (time.perf_counter() - began))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  parser.add_argument("--python-jax", default=sys.executable)
  parser.add_argument("--python-torch", default=sys.executable)
  parser.add_argument("--torch", default=None, help="comma list of {eager,compile} (bfloat16: also pure, pure+compile)")
  parser.add_argument("--without", action="append", default=[], choices=[*LEVERS, "all"])
  parser.add_argument("--steps", type=int, default=4, help="steps in a round")
  parser.add_argument("--rounds", type=int, default=6)
  parser.add_argument("--max-foreign", type=float, default=0.15, help="cores that other programs may use in a round")
  parser.add_argument("--out", help="write the figures as JSON to this file")
  args = parser.parse_args()
  default = "eager,compile" if args.dtype == "float32" else "eager,compile,pure+compile"
  modes = [mode for mode in (default if args.torch is None else args.torch).split(",") if mode]

  with tempfile.TemporaryDirectory() as folder:
    shared = SHAPE | {"dtype": args.dtype, "weights": f"{folder}/weights.npz"}
    sides = [Side("jaxllm", args.python_jax, "jax_side.py", shared | {"without": []})]
    for lever in args.without:
      off = list(LEVERS) if lever == "all" else [lever]
      sides.append(Side(f"jaxllm without {lever}", args.python_jax, "jax_side.py", shared | {"without": off}))
    for mode in modes:
      sides.append(Side(f"torch {mode}", args.python_torch, "torch_side.py", shared | {"mode": mode}))
    for side in sides:
      side.run(3, record=False)  # compile and warm up
    for _ in range(args.rounds):
      for side in sides:
        side.run(args.steps)
    for side in sides:
      side.process.stdin.close()
      side.process.wait()

  quiet = [i for i in range(args.rounds) if max(side.foreign[i] for side in sides) <= args.max_foreign]
  tokens = SHAPE["batch"] * SHAPE["length"]
  medians = [statistics.median(t for i in quiet or range(args.rounds) for t in side.rounds[i]) for side in sides]
  print(f"{cpu_name()}, {os.cpu_count()} cores, {args.dtype}, {SHAPE}")
  print(f"{len(quiet)} of {args.rounds} rounds quiet, {args.steps} steps each" + ("" if quiet else ": NOT QUIET"))
  rows = []
  for side, median in zip(sides, medians):
    gap = float(np.max(np.abs(np.subtract(side.losses, sides[0].losses))))
    speed = tokens / median
    rows.append(
      {"side": side.name, "version": side.version, "tokens_per_second": speed, "ms": 1e3 * median,
       "jaxllm_is_x_times": median / medians[0], "largest_loss_gap": gap}
    )  # fmt: skip
    print(f"{side.name:28}{side.version:24}{speed:8.0f} tokens/s {1e3 * median:8.1f} ms   "
          f"jaxllm is {median / medians[0]:.2f}x   loss gap {gap:.1e}")  # fmt: skip
  if args.out:
    command = ["git", "-C", str(SIDES), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    machine = f"{cpu_name()}, {os.cpu_count()} cores"
    facts = {"machine": machine, "commit": commit, "dtype": args.dtype, "shape": SHAPE} | {
      "quiet_rounds": len(quiet),
      "rounds": args.rounds,
      "rows": rows,
    }
    pathlib.Path(args.out).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
  main()

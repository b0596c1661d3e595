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
import pathlib
import statistics
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from sides import Side, machine, quiet_rounds, take_turns

SIDES = pathlib.Path(__file__).with_name("train_sides")
SHAPE = dict(vocab=4096, embed=384, layers=6, heads=6, mlp=1024, length=256, batch=12)
LEVERS = ("matmul", "attention", "cross_entropy", "elementwise", "unroll", "resident")


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
    sides = [Side("jaxllm", args.python_jax, SIDES / "jax_side.py", shared | {"without": []})]
    for lever in args.without:
      off = list(LEVERS) if lever == "all" else [lever]
      sides.append(Side(f"jaxllm without {lever}", args.python_jax, SIDES / "jax_side.py", shared | {"without": off}))
    for mode in modes:
      sides.append(Side(f"torch {mode}", args.python_torch, SIDES / "torch_side.py", shared | {"mode": mode}))
    take_turns(sides, args.rounds, args.steps)

  quiet, where = quiet_rounds(sides, args.max_foreign), machine()
  tokens = SHAPE["batch"] * SHAPE["length"]
  medians = [statistics.median(t for i in quiet or range(args.rounds) for t in side.rounds[i]) for side in sides]
  print(f"{where['machine']}, {args.dtype}, {SHAPE}")
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
    facts = where | {
      "dtype": args.dtype,
      "shape": SHAPE,
      "quiet_rounds": len(quiet),
      "rounds": args.rounds,
      "rows": rows,
    }
    pathlib.Path(args.out).write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
  main()

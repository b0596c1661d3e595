"""The fastest tiles of the kernels on the device at hand, into the package's table (`jaxllm/kernels/tiles.json`).

    python tools/tune_kernels.py                         # every kernel that has candidates for this chip
    python tools/tune_kernels.py --ops=attention_forward --dry

Every candidate runs the cases of tools/kernel_cases.py that use it; one that does not compile, or whose result is off,
is out. A candidate has to beat the kernel's own choice by 2 percent to be written down. --compile=h100 (or a TPU) tries
on a chip that is not here which candidates compile, and measures nothing.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from bench_kernels import timer
from kernel_cases import Case, cases

from jaxllm.kernels import tuning
from jaxllm.kernels.backends import TARGETS, target_from_device_kind

TABLE = Path(tuning.__file__).with_name("tiles.json")

# family -> op in tuning's words -> (op of the cases, backend, values of each field)
CANDIDATES: dict[str, dict[str, tuple[str, str, dict[str, tuple]]]] = {
  "cpu": {
    "attention_xla": ("attention", "xla", {"queries": (32, 64, 128, 256, 512)}),
    "cross_entropy_xla": ("cross_entropy", "xla", {"logits": tuple(1 << n for n in (18, 20, 22, 24))}),
  },
  "hopper": {
    "attention_forward": (
      "attention",
      "mosaic_gpu",
      {"block_kv": (64, 96, 128, 160), "stages": (2, 3, 4), "warpgroups": (2, 3)},
    ),
    "attention_backward": (
      "attention backward",
      "mosaic_gpu",
      {"keys": (64, 128), "queries": (64, 128), "key_slots": (1, 2), "query_slots": (1, 2)},
    ),
    "cross_entropy": ("cross_entropy", "mosaic_gpu", {"words": (128, 256), "stages": (3, 4, 5), "group": (8, 16, 32)}),
    "grouped_matmul": ("grouped_matmul", "mosaic_gpu", {"stages": (3, 4, 5), "strip": (8, 16, 32)}),
    "quantized_matmul": (
      "quantized_matmul",
      "mosaic_gpu",
      {"features": (64, 128), "steps": (2, 3, 4, 6), "splits": (1, 2, 4, 8)},
    ),
    "paged_attention": ("paged_attention", "mosaic_gpu", {"block": (64, 128), "stages": (2, 3, 4, 6)}),
  },
  "tpu": {
    "attention_forward": (
      "attention",
      "pallas_tpu",
      {"block_q": (256, 512, 1024), "block_k": (512, 1024, 2048), "chunk": (256, 512, 1024)},
    ),
    "attention_backward": (
      "attention backward",
      "pallas_tpu",
      {"block_q": (256, 512, 1024), "block_k": (512, 1024), "chunk": (256, 512)},
    ),
    "cross_entropy": ("cross_entropy", "pallas_tpu", {"tokens": (256, 512, 1024), "words": (512, 1024, 2048)}),
    "grouped_matmul": ("grouped_matmul", "pallas_tpu", {"rows": (256, 512, 1024), "columns": (256, 512, 1024)}),
    "quantized_matmul": ("quantized_matmul", "pallas_tpu", {"features": (256, 512, 1024), "inputs": (512, 1024, 2048)}),
  },
}


def candidates(fields: dict[str, tuple]):
  """Every combination; the empty one, the kernel's own choice, comes first."""
  yield {}
  for values in itertools.product(*fields.values()):
    yield dict(zip(fields, values))


def tune(case: Case, op: str, backend: str, fields, target: str, measure) -> tuple[str, dict] | None:
  """(facts of the call, best tiles) where something beats the kernel's own choice."""
  inputs = case.values()
  own, best, best_ms, key = None, {}, float("inf"), ""
  own_ms = float("inf")
  for candidate in candidates(fields):
    with tuning.trying(op, candidate) as asked:
      try:
        run = jax.jit(lambda *arguments: case.ours(backend, target)(*arguments))
        result = jax.block_until_ready(run(*inputs))
      except Exception:  # tiles that do not fit
        continue
      key = asked.get(op, "")
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(result)]
    own = own or leaves
    if any(np.abs(a - b).max() > 0.05 * max(np.abs(b).max(), 1e-6) for a, b in zip(leaves, own)):
      print(f"  {candidate}: another result than the kernel's own choice")
      continue
    ms = statistics.median(measure(run, inputs))
    print(f"  {candidate or 'own choice'}: {ms:.4f} ms", flush=True)
    own_ms = ms if not candidate else own_ms
    if candidate and ms < 0.98 * own_ms and ms < best_ms:
      best, best_ms = candidate, ms
  return (key, best) if best else None


def compiles(case: Case, op: str, backend: str, fields, target: str) -> None:
  """Prints what the compilers say of every candidate."""
  import machine_code

  for candidate in candidates(fields):
    with tuning.trying(op, candidate):
      function = lambda *arguments: case.ours(backend, target)(*arguments)  # noqa: E731
      try:
        if target in machine_code.GPUS:
          for kernel in machine_code.compile_gpu(function, case.inputs, target)[1]:
            loop = f"{kernel.loop_tensor_cycles} tensor-core to {kernel.loop_issue_cycles} issue cycles"
            print(f"  {candidate}: {kernel.name} {kernel.registers} registers, {kernel.spill_bytes} B spilled, {loop}")
        else:
          machine_code.compile_tpu(function, case.inputs, target)
          print(f"  {candidate}: fits")
      except Exception as error:
        print(f"  {candidate}: {str(error).strip().splitlines()[0][:120]}")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--ops", default="", help="comma list; default: all that have candidates")
  parser.add_argument("--match", default="", help="only cases whose name has this")
  parser.add_argument("--calls", type=int, default=20)
  parser.add_argument("--compile", default="", help="a chip to compile for; nothing is measured or written")
  parser.add_argument("--dry", action="store_true", help="write nothing")
  args = parser.parse_args()
  device = jax.devices()[0]
  target = args.compile or target_from_device_kind(device.platform, device.device_kind)
  family = TARGETS[target]
  table = json.loads(TABLE.read_text())
  for op, (case_op, backend, fields) in CANDIDATES.get(family, {}).items():
    if args.ops and op not in args.ops.split(","):
      continue
    for case in cases(family):
      if case.op != case_op or backend not in case.backends or args.match not in case.name:
        continue
      print(f"{op}: {case.name}", flush=True)
      if args.compile:
        compiles(case, op, backend, fields, target)
      elif found := tune(case, op, backend, fields, target, timer(args.calls)):
        print(f"  best: {found[0]}: {found[1]}")
        table.setdefault(target, {}).setdefault(op, {})[found[0]] = found[1]
  if not args.dry and not args.compile:
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"wrote {TABLE}")


if __name__ == "__main__":
  main()

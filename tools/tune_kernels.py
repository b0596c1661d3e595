"""The fastest tiles of the kernels on the device at hand, into the package's table (`jaxllm/kernels/tiles.json`).

    python tools/tune_kernels.py                         # every kernel that has candidates for this chip
    python tools/tune_kernels.py --ops=attention_forward --dry

Every candidate runs the cases of tools/kernel_cases.py that use it, in a child process: one that does not compile,
crashes, hangs or gives another result is out. The fastest then runs in turn with the kernel's own choice, and is
written down if it wins by 3 percent over all cases that share its table entry, in almost every round, and loses
nowhere. Entries are of chips that were measured and of no others. --compile=h100 (or a TPU) tries on a chip that is not
here which candidates compile, and measures nothing.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import isolate
from bench_worker import copies, device_facts, healthy, inputs_of, timings
from kernel_cases import Case, cases

from jaxllm.kernels import tuning
from jaxllm.kernels.backends import TARGETS

TABLE = Path(tuning.__file__).with_name("tiles.json")
GAIN, ROUNDS = 0.97, 9


@dataclasses.dataclass(frozen=True)
class Candidates:
  """The values to try of a kernel's tiles. cases: ops of the cases; backend: whose tiles they are."""

  cases: tuple[str, ...]
  backend: str
  fields: dict[str, tuple]

  def __iter__(self):
    """Every combination; the empty one, the kernel's own choice, comes first."""
    yield {}
    for values in itertools.product(*self.fields.values()):
      yield dict(zip(self.fields, values))


# family -> op in tuning's words
CANDIDATES: dict[str, dict[str, Candidates]] = {
  "cpu": {
    "attention_xla": Candidates(("attention", "attention backward"), "xla", {"queries": (8, 16, 32, 64, 128, 256)}),
    "paged_attention_xla": Candidates(("paged_attention",), "xla", {"keys": (64, 128, 512, 1024)}),
    "grouped_matmul_xla": Candidates(("grouped_matmul",), "xla", {"rows": (32, 64, 128, 256, 512)}),
  },
  "hopper": {
    "attention_forward": Candidates(
      ("attention",), "mosaic_gpu", {"block_kv": (64, 96, 128, 160), "stages": (2, 3, 4), "warpgroups": (2, 3)}
    ),
    "attention_backward": Candidates(
      ("attention backward",),
      "mosaic_gpu",
      {"keys": (64, 128), "queries": (64, 128), "key_slots": (1, 2), "query_slots": (1, 2)},
    ),
    "cross_entropy": Candidates(
      ("cross_entropy",), "mosaic_gpu", {"words": (128, 256), "stages": (3, 4, 5), "group": (8, 16, 32)}
    ),
    "grouped_matmul": Candidates(("grouped_matmul",), "mosaic_gpu", {"stages": (3, 4, 5), "strip": (8, 16, 32)}),
    "grouped_gradient": Candidates(("grouped_matmul",), "mosaic_gpu", {"stages": (3, 4, 5), "strip": (8, 16, 32)}),
    "quantized_matmul": Candidates(
      ("quantized_matmul",), "mosaic_gpu", {"features": (64, 128), "steps": (2, 3, 4, 6), "splits": (1, 2, 4, 8)}
    ),
    "paged_attention": Candidates(("paged_attention",), "mosaic_gpu", {"block": (64, 128), "stages": (2, 3, 4, 6)}),
  },
  "tpu": {
    "attention_forward": Candidates(
      ("attention",),
      "pallas_tpu",
      {"block_q": (256, 512, 1024), "block_k": (512, 1024, 2048), "chunk": (256, 512, 1024)},
    ),
    "attention_backward": Candidates(
      ("attention backward",),
      "pallas_tpu",
      {"block_q": (256, 512, 1024), "block_k": (512, 1024), "chunk": (256, 512)},
    ),
    "cross_entropy": Candidates(
      ("cross_entropy",), "pallas_tpu", {"tokens": (256, 512, 1024), "words": (512, 1024, 2048)}
    ),
    "grouped_matmul": Candidates(
      ("grouped_matmul",), "pallas_tpu", {"rows": (256, 512, 1024), "columns": (256, 512, 1024)}
    ),
    "grouped_gradient": Candidates(
      ("grouped_matmul",), "pallas_tpu", {"rows": (256, 512, 1024), "columns": (256, 512, 1024)}
    ),
    "quantized_matmul": Candidates(
      ("quantized_matmul",), "pallas_tpu", {"features": (256, 512, 1024), "inputs": (512, 1024, 2048)}
    ),
  },
}


# ---------------------------------------------------------------- the child


class Trier:
  """Runs candidates of one case after another."""

  def __init__(self, family: str, target: str, calls: int):
    self.cases = {(case.op, case.name): case for case in cases(family)}
    self.target, self.calls, self.at = target, calls, None

  def handle(self, job: dict) -> dict:
    """{"key": facts of the call, "ms": median} of a candidate; {"ratios": ...} to the own choice in a duel."""
    try:
      return self.measure(job, self.cases[job["cases"], job["case"]])
    except Exception as error:
      refused = {"out": str(error).strip().split("\n")[0][:120] or type(error).__name__}
      return refused | ({} if healthy() else {"poisoned": True})

  def measure(self, job: dict, case: Case) -> dict:
    if self.at != (job["op"], case.op, case.name):
      self.at = None
      self.sets = [inputs_of(case, seed) for seed in range(copies(case))]
      self.own, self.key = self.compiled(job | {"candidate": {}}, case)
      self.truth = self.leaves(self.own(*self.sets[0]))
      self.at = job["op"], case.op, case.name
    if not self.key:
      return {"out": "no such tiles are asked for by this case"}
    run, key = (self.own, self.key) if not job["candidate"] else self.compiled(job, case)
    for a, b in zip(self.leaves(run(*self.sets[0])), self.truth, strict=True):
      if not np.abs(a - b).max() <= 0.02 * max(np.abs(b).max(), 1e-6):
        return {"out": "another result than the kernel's own choice"}
    median = lambda f: statistics.median(timings(f, self.sets, self.calls)[0])  # noqa: E731
    if job.get("duel"):
      return {"key": key, "ratios": [median(run) / median(self.own) for _ in range(ROUNDS)]}
    return {"key": key, "ms": median(run)}

  def compiled(self, job, case):
    with tuning.trying(job["op"], job["candidate"]) as asked:
      asked.pop(job["op"], None)
      run = jax.jit(case.ours(job["backend"], self.target))
      jax.block_until_ready(run(*self.sets[0]))
      return run, asked.get(job["op"], "")

  def leaves(self, result):
    return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(result)]


# ---------------------------------------------------------------- choosing


def winner(times: dict[Any, dict[str, float]]) -> str | None:
  """The candidate with the least geometric mean of its times over those of the own choice, "{}", if that is a gain.

  times: case -> candidate -> milliseconds; a candidate that is missing in a case is out.
  """
  everywhere = set.intersection(*(set(of_case) for of_case in times.values()))
  mean = lambda c: math.exp(statistics.fmean(math.log(t[c] / t["{}"]) for t in times.values()))  # noqa: E731
  best = min(everywhere, key=mean, default="{}")
  return best if best != "{}" and mean(best) < GAIN else None


def robust(ratios: dict[Any, list[float]]) -> bool:
  """Whether duels were won: by GAIN over all cases, in all but two rounds of the mean, and lost in no case."""
  medians = [statistics.median(r) for r in ratios.values()]
  rounds = [math.exp(statistics.fmean(map(math.log, together))) for together in zip(*ratios.values())]
  clear = sum(r < 1 for r in rounds) >= len(rounds) - 2
  return clear and math.exp(statistics.fmean(map(math.log, medians))) < GAIN and max(medians) < 1.02


def job_of(op, cases, case, found, candidate) -> dict:
  return {"op": op, "cases": cases, "case": case, "backend": found.backend, "candidate": candidate}


def tune(op: str, found: Candidates, chosen: list[Case], ask) -> dict[str, dict]:
  """facts of the call -> tiles that beat the kernel's own. ask: job -> the child's answer."""
  times: dict[str, dict[tuple[str, str], dict[str, float]]] = {}  # facts -> (op, name) of a case -> candidate -> ms
  for case in chosen:
    print(f"{op}: {case.op} {case.name}", flush=True)
    for candidate in found:
      answer = ask(job_of(op, case.op, case.name, found, candidate))
      said = f"{answer['ms']:.4f} ms" if "ms" in answer else answer["out"]
      print(f"  {candidate or 'own choice'}: {said}", flush=True)
      if "ms" in answer:
        of_case = times.setdefault(answer["key"], {}).setdefault((case.op, case.name), {})
        of_case[json.dumps(candidate)] = answer["ms"]
      elif not candidate:
        break
  best: dict[str, dict] = {}
  for key, of_cases in times.items():
    if (name := winner(of_cases)) is None:
      continue
    candidate, ratios = json.loads(name), {}
    for case in of_cases:
      answer = ask(job_of(op, *case, found, candidate) | {"duel": True})
      ratios[case] = answer.get("ratios", [float("inf")] * ROUNDS)
      said = " ".join(f"{ratio:.2f}" for ratio in ratios[case])
      print(f"  duel, {key}: {candidate}, {' '.join(case)}: {said} of the own choice's time", flush=True)
    if robust(ratios):
      best[key] = candidate
  return best


def compiles(case: Case, op: str, found: Candidates, target: str) -> None:
  """Prints what the compilers say of every candidate."""
  import machine_code

  for candidate in found:
    with tuning.trying(op, candidate):
      function = lambda *arguments: case.ours(found.backend, target)(*arguments)  # noqa: E731
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
  parser.add_argument("--timeout", type=float, default=300, help="seconds for one candidate")
  parser.add_argument("--compile", default="", help="a chip to compile for; nothing is measured or written")
  parser.add_argument("--dry", action="store_true", help="write nothing")
  args = parser.parse_args()
  if isolate.ANSWERS in os.environ:
    facts = device_facts()
    trier = Trier(TARGETS[facts["target"]], facts["target"], args.calls)
    return isolate.serve(lambda job: facts if job.get("do") == "facts" else trier.handle(job))
  jax.config.update("jax_platforms", "cpu")  # the device is the child's
  child = isolate.Child([sys.executable, *sys.argv])

  def ask(job):
    try:
      answer = child.ask(job, args.timeout)
    except isolate.Lost as lost:
      return {"out": str(lost)}
    if answer.pop("poisoned", False):
      child.close()
    return answer

  try:
    target = args.compile or child.ask({"do": "facts"}, args.timeout)["target"]
    family = TARGETS[target]
    table = json.loads(TABLE.read_text())
    for op, found in CANDIDATES.get(family, {}).items():
      if args.ops and op not in args.ops.split(","):
        continue
      chosen = [case for case in cases(family) if case.op in found.cases and args.match in case.name]
      if args.compile:
        for case in chosen:
          print(f"{op}: {case.name}", flush=True)
          compiles(case, op, found, target)
        continue
      for key, tiles in tune(op, found, chosen, ask).items():
        print(f"  into the table: {key}: {tiles}")
        table.setdefault(target, {}).setdefault(op, {})[key] = tiles
    if not args.dry and not args.compile:
      TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
      print(f"wrote {TABLE}")
  finally:
    child.close()


if __name__ == "__main__":
  main()

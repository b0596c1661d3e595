"""What devices send one another in a training step, by the program that was compiled for them, ahead of time.

    python tools/collectives.py --config=configs/llama3_8b.py --topology=v5p:4x4x2 --set=mesh.fsdp=8 --set=mesh.tensor=4
    python tools/collectives.py --cases --out=experiments/benchmarks/collectives               # those of CASES
    python tools/collectives.py --cases --before=DIR --out=experiments/benchmarks/collectives  # and by DIR's package

A topology is a slice of TPUs ("v5p:4x4x2") or the GPUs of a host ("h100:8"). One row for each kind, array, loop, mesh
axes and origin of collectives. "bytes" is the size of the whole array that is reduced, gathered or sent, "a step" times
how often that is done, on each device: an algorithm moves up to twice as much over links, or less. Loops stand as
"outer > inner"; "ring" is a loop that XLA makes of a gathered or scattered factor of a matrix product. The origin is
the innermost file of the package. Rows under a thousandth of the bytes are added up, those in the head's loss never.

Needs what compiling for those chips needs: libtpu, or jax's CUDA plugin.
"""

import argparse
import collections
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hlo import collectives

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
  """A config, changes of it, and the devices that it is compiled for."""

  name: str
  config: str
  topology: str
  changes: tuple[str, ...] = ()  # key=value


_EXPERTS = ("model.moe.num_experts=8", "model.moe.mlp_dim=2048", "mesh.data=1", "mesh.fsdp=2", "mesh.expert=8")
CASES = (
  Case("llama3_8b, v5p 4x4x2, fsdp 32", "llama3_8b", "v5p:4x4x2", ("mesh.fsdp=32",)),
  Case("llama3_8b, v5p 4x4x2, fsdp 8 x tensor 4", "llama3_8b", "v5p:4x4x2", ("mesh.fsdp=8", "mesh.tensor=4")),
  Case("gpt2_124m, 8 H100, data 8", "gpt2_124m", "h100:8", ("mesh.data=8",)),
  Case(
    "llama_1b with 8 experts of 2048, v6e 4x4, fsdp 2 x expert 8",
    "llama_1b",
    "v6e:4x4",
    (*_EXPERTS, "training.accumulation=2"),
  ),
)


def compile_step(case: Case) -> tuple[str, jax.sharding.Mesh, dict]:
  """The text of the compiled train step, the mesh, and facts: seconds, bytes of temporaries a device."""
  from jaxllm.config import load_config
  from jaxllm.parallel.mesh import make_mesh
  from jaxllm.parallel.topologies import GPUS, gpu_mesh, tpu_mesh
  from jaxllm.training.compile import make_program

  # A cached program tells where the code stood that it was first compiled from.
  jax.config.update("jax_enable_compilation_cache", False)
  chip, _, size = case.topology.partition(":")
  devices = gpu_mesh(chip, int(size or 1)) if chip in GPUS else tpu_mesh(case.topology)
  path = case.config if case.config.endswith(".py") else str(ROOT / "configs" / f"{case.config}.py")
  run = load_config(path, [tuple(change.split("=", 1)) for change in case.changes])
  mesh = make_mesh(run.mesh, list(devices.devices.flat))
  program = make_program(run.model, run.training, run.optimizer, run.mesh, mesh, run.objective, run.data, run.compute)
  start = time.monotonic()
  traced = program.step.trace(*program.arguments)
  compiled = traced.lower(lowering_platforms=("cuda" if chip in GPUS else "tpu",)).compile()
  facts = {
    "seconds": round(time.monotonic() - start),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "tokens": program.tokens_per_step,
  }
  return compiled.as_text(), mesh, facts


def table(text: str, mesh: jax.sharding.Mesh) -> list[dict]:
  """Rows of the same collectives, most bytes first."""
  count: collections.Counter = collections.Counter()
  times: dict[tuple, int | None] = collections.defaultdict(int)
  for one in collectives(text, mesh):
    key = (one.kind, one.shape, one.bytes, one.loops, one.axes, one.file)
    count[key] += 1
    before = times[key]
    times[key] = None if one.times is None or before is None else before + one.times
  rows = [
    {
      "kind": kind,
      "array": shape,
      "bytes": size,
      "instructions": count[key],
      "times a step": times[key],
      "bytes a step": None if times[key] is None else size * times[key],
      "loops": list(loops),
      "axes": list(axes),
      "from": file,
    }
    for key in count
    for kind, shape, size, loops, axes, file in [key]
  ]
  return sorted(rows, key=lambda row: -(row["bytes a step"] or 0))


def totals(rows: list[dict]) -> dict[str, int]:
  """Bytes a step by the innermost loop that is no ring."""
  found: collections.Counter = collections.Counter()
  for row in rows:
    loops = [loop for loop in row["loops"] if loop != "ring"]
    found[loops[-1] if loops else "no loop"] += row["bytes a step"] or 0
  return dict(found)


# ---------------------------------------------------------------- for people


def readable(size: int | None) -> str:
  """Bytes with three digits."""
  if size is None:
    return "?"
  for unit in ("B", "kB", "MB", "GB", "TB"):
    if size < 1000 or unit == "TB":
      return f"{size:.3g} {unit}"
    size /= 1000
  raise AssertionError


def markdown(rows: list[dict]) -> list[str]:
  """The lines of one table."""
  columns = ("kind", "array", "bytes", "instructions", "times a step", "bytes a step", "loops", "axes", "from")
  lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
  total = sum(row["bytes a step"] or 0 for row in rows)
  rest = []
  for row in rows:
    if row["bytes a step"] is not None and row["bytes a step"] < total / 1000 and "head loss" not in row["loops"]:
      rest.append(row)
      continue
    cells = row | {name: readable(row[name]) for name in ("bytes", "bytes a step")}
    cells |= {"loops": " > ".join(row["loops"]) or "none", "axes": " x ".join(row["axes"])}
    lines.append("| " + " | ".join("?" if cells[name] is None else str(cells[name]) for name in columns) + " |")
  if rest:
    size, number = sum(row["bytes a step"] for row in rest), sum(row["instructions"] for row in rest)
    lines.append(f"| the rest | | | {number} | {sum(row['times a step'] for row in rest)} | {readable(size)} | | | |")
  return lines


def page(results: dict) -> str:
  """All cases: totals, then every table."""
  lines = ["# Collectives of a training step\n"]
  lines.append(f"`{results['command']}`, jax {results['jax']}. What is counted: see tools/collectives.py.\n")
  for case in results["cases"]:
    lines += [f"\n## {case['name']}\n", f"`--config=configs/{case['config']}.py --topology={case['topology']} "]
    lines[-1] += " ".join(f"--set={change}" for change in case["changes"]) + "`\n"
    sides = [side for side in ("before", "after") if side in case]
    loops = dict.fromkeys(loop for side in sides for loop in totals(case[side]["rows"]))
    lines += ["| bytes a step, each device | " + " | ".join(sides) + " |", "|---|" + "---|" * len(sides)]
    sums = {side: totals(case[side]["rows"]) for side in sides}
    for loop in loops:
      lines.append(f"| in {loop} | " + " | ".join(readable(sums[side].get(loop, 0)) for side in sides) + " |")
    lines.append("| together | " + " | ".join(readable(sum(sums[side].values())) for side in sides) + " |")
    lines.append("| memory for temporaries | " + " | ".join(readable(case[s]["temporaries"]) for s in sides) + " |")
    for side in sides:
      lines += [f"\n### {side.capitalize()}\n", *markdown(case[side]["rows"])]
  return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- running


def _in_a_process(case: Case, tree: Path) -> dict:
  """The case compiled by the package that lies in `tree`."""
  changes = [f"--set={change}" for change in case.changes]
  command = [sys.executable, __file__, f"--config={case.config}", f"--topology={case.topology}", *changes, "--json"]
  environment = os.environ | {"PYTHONPATH": str(tree)}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config")
  parser.add_argument("--topology")
  parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a config key to change")
  parser.add_argument("--json", action="store_true", help="print rows for programs")
  parser.add_argument("--cases", action="store_true", help="compile all of CASES, each in a process of its own")
  parser.add_argument("--only", default="", help="of CASES those whose name has this")
  parser.add_argument("--before", default="", help="another checkout, whose package is compiled too")
  parser.add_argument("--out", default="", help="where to write the tables, without ending; earlier ones stay")
  args = parser.parse_args()
  if not args.cases:
    if not args.config or not args.topology:
      parser.error("give --config and --topology, or --cases")
    text, mesh, facts = compile_step(Case("", args.config, args.topology, tuple(args.set)))
    rows = table(text, mesh)
    print(
      json.dumps(facts | {"rows": rows}) if args.json else "\n".join([str(facts), str(totals(rows)), *markdown(rows)])
    )
    return
  out = Path(args.out) if args.out else None
  known = {}
  if out and (stored := out.with_suffix(".json")).exists():
    known = {case["name"]: case for case in json.loads(stored.read_text())["cases"]}
  for case in CASES:
    if args.only not in case.name:
      continue
    result = known.get(case.name, {}) | dataclasses.asdict(case)
    if args.before:
      result["before"] = _in_a_process(case, Path(args.before).resolve())
    result["after"] = _in_a_process(case, ROOT)
    known[case.name] = result
    print(case.name, {side: totals(result[side]["rows"]) for side in ("before", "after") if side in result}, flush=True)
    if out:
      cases = [known[one.name] for one in CASES if one.name in known]
      results = {"command": "python tools/collectives.py --cases", "jax": jax.__version__, "cases": cases}
      out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
      out.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
  main()

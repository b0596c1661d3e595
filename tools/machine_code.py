"""What a kernel becomes on a chip that is not here: compiled ahead of time, read from the compiler's own output.

    python tools/machine_code.py                    # every kernel and its peers, for H100 and four TPUs
    python tools/machine_code.py --ops=attention --chips=h100,v5e
    python tools/machine_code.py --out=experiments/benchmarks/machine_code     # into .json and .md

TPU: libtpu compiles, so a block that does not fit the vector memory is an error. H100: Mosaic GPU writes PTX, ptxas
makes machine code of it, and nvdisasm lists the instructions. Needs Python 3.12, jax 0.11, libtpu, jax's CUDA plugin,
ptxas and nvdisasm (`pip install -e '.[aot]'`).

Cycles are estimates of one round of a kernel's longest loop with tensor-core work, from the instructions alone: the
tensor core needs N / 2 cycles for a 64 x N x 16 product of 16-bit numbers (4096 FLOP a cycle and multiprocessor), and
each of a multiprocessor's four schedulers issues one instruction a cycle. A loop whose issue cycles, times the
warpgroups that share the multiprocessor, stay below their tensor-core cycles can keep the tensor core busy.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.parallel.topologies import GPUS, gpu_mesh, tpu_mesh

SHARED_MEMORY_LIMIT = 232448  # bytes a block of Hopper may have


@dataclasses.dataclass(frozen=True)
class MachineCode:
  """One GPU kernel as ptxas left it."""

  name: str
  registers: int
  spill_bytes: int  # stores and loads
  shared_bytes: int
  tensor_core: int  # HGMMA, IMMA, QGMMA and HMMA instructions
  tma: int  # bulk tensor copies, both ways
  local: int  # loads and stores of local memory: spills, or arrays that found no register
  instructions: int
  loop_tensor_cycles: int  # of one warpgroup, a round of the longest loop
  loop_issue_cycles: int
  serialized: bool  # ptxas lets each product wait for the one before it


@dataclasses.dataclass(frozen=True)
class Bundles:
  """One TPU kernel as libtpu scheduled it: instruction bundles, of which each takes a cycle if nothing waits."""

  name: str
  bundles: int  # of one straight pass: every loop body once
  matrix_unit: int  # operations of the matrix units in them
  spills: int  # vector registers stored and filled again


def compile_tpu(function: Callable, avals: tuple, chip: str) -> jax.stages.Compiled:
  """`function` compiled for one TPU chip ("v5e", "v5p", "v6e", "v7")."""
  return _compile(function, avals, tpu_mesh(chip), "tpu")


def schedules_tpu(function: Callable, avals: tuple, chip: str) -> tuple[jax.stages.Compiled, list[Bundles]]:
  """Like `compile_tpu`, with the schedule of each Pallas kernel; slower, for libtpu writes out all its stages.

  libtpu reads its flags once, so this has to be the first use of it in the process.
  """
  dump = Path(tempfile.gettempdir()) / f"libtpu-{os.getpid()}"
  os.environ.setdefault("LIBTPU_INIT_ARGS", f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true")
  shutil.rmtree(dump, ignore_errors=True)
  dump.mkdir()
  compiled = compile_tpu(function, avals, chip)
  kernels = set(re.findall(r"%([\w.-]+) = [^\n]*custom_call_target=\"tpu_custom_call\"", compiled.as_text()))
  found = []
  for path in sorted(dump.glob("*final_hlo-static-per-bundle-utilization.txt")):
    name = re.sub(r"^\d+-|-\d+-final_hlo.*$", "", path.name)
    if name in kernels:
      lines = path.read_text().split("UTILIZATION:\n")[-1].splitlines()
      rows = [[int(n) for n in line.split()] for line in lines if line.strip()]
      found.append(Bundles(name, len(rows), sum(r[0] for r in rows), sum(r[6] + r[8] for r in rows)))
  shutil.rmtree(dump, ignore_errors=True)
  return compiled, found


def compile_gpu(function: Callable, avals: tuple, chip: str = "h100") -> tuple[jax.stages.Compiled, list[MachineCode]]:
  """`function` compiled for one GPU, and the machine code of each of its Mosaic kernels.

  jaxlib reads the folder to dump to once, so all calls of a process share it.
  """
  dump = Path(os.environ.setdefault("MOSAIC_GPU_DUMP_TO", tempfile.mkdtemp(prefix="mosaic-gpu-")))
  before = set(dump.iterdir())
  abstract = jax.sharding.AbstractMesh(
    (1,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    abstract_device=_abstract_device(GPUS[chip]["name"]),
  )
  with jax.sharding.use_abstract_mesh(abstract):  # kernels that ask for the number of cores find it there
    compiled = _compile(function, avals, gpu_mesh(chip), "cuda")
  kernels = sorted(path for path in set(dump.iterdir()) - before if path.suffix == ".ptx")
  return compiled, [_read(path) for path in kernels]


def _abstract_device(kind):
  from jax._src.mesh import AbstractDevice

  return AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")


def _compile(function, avals, mesh, platform):
  sharding = NamedSharding(mesh, PartitionSpec())
  avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), avals)
  return jax.jit(function).trace(*avals).lower(lowering_platforms=(platform,)).compile()


def find_tool(name: str) -> str | None:
  """ptxas or nvdisasm: on the path, or in the wheels of NVIDIA."""
  if found := shutil.which(name):
    return found
  here = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / "nvidia"
  return next((str(path) for path in here.glob(f"*/bin/{name}")), None)


def _read(ptx: Path) -> MachineCode:
  ptxas, nvdisasm = find_tool("ptxas"), find_tool("nvdisasm")
  if ptxas is None or nvdisasm is None:
    raise SystemExit("machine code needs ptxas and nvdisasm: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm")
  with tempfile.TemporaryDirectory() as folder:
    cubin = f"{folder}/kernel.cubin"
    said = subprocess.run(
      [ptxas, "-v", "-arch=sm_90a", str(ptx), "-o", cubin], capture_output=True, text=True, check=True
    ).stderr
    sass = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
  registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
  spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
  codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.M)
  resources = (ptx.parent / f"{ptx.stem}.resources.txt").read_text()
  shared = int(re.search(r"smem_scratch_bytes=(\d+)", resources).group(1))
  tensor_cycles, issue_cycles = _longest_loop(sass)
  count = lambda *names: sum(code.startswith(names) for code in codes)  # noqa: E731
  return MachineCode(
    name=ptx.stem,
    registers=registers,
    spill_bytes=spills,
    shared_bytes=shared,
    tensor_core=count("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA"),
    tma=count("UTMALDG", "UTMASTG", "UBLKCP"),
    local=count("LDL", "STL"),
    instructions=len(codes),
    loop_tensor_cycles=tensor_cycles,
    loop_issue_cycles=issue_cycles,
    serialized="serialized" in said,
  )


def _longest_loop(sass: str) -> tuple[int, int]:
  """(tensor-core cycles, other instructions) of the innermost loop that has the most tensor-core work."""
  lines, labels = [], {}
  for line in sass.splitlines():
    if label := re.match(r"^(\.L_x_\d+):", line):
      labels[label.group(1)] = len(lines)
    elif re.match(r"^\s+/\*[0-9a-f]{4,}\*/", line):
      lines.append(line)
  loops = []
  for end, line in enumerate(lines):
    target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
    if target and labels.get(target.group(1), end + 1) <= end:
      loops.append((labels[target.group(1)], end + 1))
  innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
  best = (0, 0)
  for start, end in innermost:
    shapes = [re.search(r"GMMA\.64x(\d+)x", line) for line in lines[start:end]]
    tensor = sum(int(shape.group(1)) // 2 for shape in shapes if shape)
    best = max(best, (tensor, end - start - sum(bool(shape) for shape in shapes)))
  return best


def report_gpu(case, name, function, chip) -> list[dict]:
  """Rows of one side of a case: a row for each Mosaic kernel, one without figures where there is none."""
  start = time.perf_counter()
  compiled, kernels = compile_gpu(function, case.inputs, chip)
  seconds = time.perf_counter() - start
  row = {"chip": chip, "op": case.op, "case": case.name, "side": name, "compile_s": round(seconds, 1)}
  row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
  return [row | dataclasses.asdict(kernel) for kernel in kernels] or [row]


def report_tpu(case, name, function, chip) -> list[dict]:
  """Rows of one side of a case: a row for each Pallas kernel, one without figures where there is none."""
  start = time.perf_counter()
  compiled, kernels = schedules_tpu(function, case.inputs, chip)
  seconds = time.perf_counter() - start
  row = {"chip": chip, "op": case.op, "case": case.name, "side": name, "compile_s": round(seconds, 1)}
  row["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
  # Of what XLA makes around the kernels, which themselves count as none.
  row["cycles_outside"] = sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', compiled.as_text()))
  return [row | dataclasses.asdict(kernel) for kernel in kernels] or [row]


def main():
  from kernel_cases import cases

  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--ops", default="", help="comma list; default: all")
  parser.add_argument("--chips", default="h100,v5e,v5p,v6e,v7")
  parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--match", default="", help="only cases whose name this regular expression finds")
  parser.add_argument("--out", default="", help="where to write the table, without ending")
  args = parser.parse_args()
  rows = []
  for chip in args.chips.split(","):
    gpu = chip in GPUS
    report, backend = (report_gpu, "mosaic_gpu") if gpu else (report_tpu, "pallas_tpu")
    peers = ("tokamax", "jax FA3") if gpu else ("jax splash", "tokamax", "jax megablox", "jax ragged paged")
    for case in cases("hopper" if gpu else "tpu"):
      if not re.search(args.match, case.name) or (args.ops and case.op not in args.ops.split(",")):
        continue
      sides = {"jaxllm": case.ours(backend, chip)}
      sides |= {name: peer for name, peer in case.others.items() if args.peers and name in peers}
      for name, function in sides.items():
        try:
          rows += report(case, name, function, chip)
        except Exception as error:  # a peer's limits are a result too
          said = str(error).strip().split("\n")[0][:200]
          rows.append({"chip": chip, "op": case.op, "case": case.name, "side": name, "refused": said})
        print(json.dumps(rows[-1]), flush=True)
  if args.out:
    out = Path(args.out)
    facts = {"jax": jax.__version__, "command": "python " + " ".join(sys.argv)}
    out.with_suffix(".json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(rows, facts))
  if any("refused" in row and row["side"] == "jaxllm" for row in rows):
    raise SystemExit("some of our kernels did not compile")


def markdown(rows: list[dict], facts: dict) -> str:
  """The table as people read it."""
  gpu = ("op", "case", "side", "name", "registers", "spill_bytes", "local", "shared_bytes", "tensor_core", "tma")
  gpu += ("loop_tensor_cycles", "loop_issue_cycles", "temp_bytes", "compile_s")
  tpu = ("chip", "op", "case", "side", "name", "bundles", "matrix_unit", "spills", "cycles_outside", "temp_bytes")
  tpu += ("compile_s",)
  lines = [
    f"# Machine code of the kernels\n\njax {facts['jax']}, `{facts['command']}`; columns: see tools/machine_code.py.\n"
  ]
  for title, columns, chips in (("H100", gpu, set(GPUS)), ("TPU", tpu, {row["chip"] for row in rows} - set(GPUS))):
    lines += [f"\n## {title}\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
      if row["chip"] in chips:
        cells = [str(row.get(column, "")) for column in columns]
        if "refused" in row:
          cells[-1] = row["refused"].replace("|", "/")
        lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  main()

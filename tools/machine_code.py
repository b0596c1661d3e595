"""What a kernel becomes on a chip that is not here: compiled ahead of time, read from the compiler's own output.

    python tools/machine_code.py                                     # the targets and their peers, H100 and four TPUs
    python tools/machine_code.py --tags=target,shape,option --ops=attention --chips=h100,v5e
    python tools/machine_code.py --out=experiments/benchmarks/machine_code        # one table a family of chips
    python tools/machine_code.py --out=... --resume                  # only what the tables lack: after an interruption

With --out, what is compiled takes its place in OUT_h100 and OUT_tpu (.json and .md), and the rest of them stays: a part
can be made again by --ops, --chips, --match or --tags. A case that fails is a row that says why.

TPU: libtpu compiles, so a block that does not fit the vector memory is an error. H100: Mosaic GPU writes PTX, ptxas
makes machine code of it, and nvdisasm lists the instructions. Needs Python 3.12, jax 0.11, libtpu, jax's CUDA plugin,
ptxas and nvdisasm (`pip install -e '.[aot]'`); tokamax among the peers needs `pip install -e '.[peers]'`.

What the columns say:

* loop_tensor_cycles, loop_issue_cycles (GPU): of one warpgroup, a round of the longest loop with tensor-core work, from
  the instructions alone. The tensor core needs N / 2 cycles for a 64 x N x 16 product of 16-bit numbers, or a 64 x N x
  32 one of 8-bit numbers (4096 or 8192 FLOP a cycle and multiprocessor), and each of a multiprocessor's four schedulers
  issues one instruction a cycle. tensor_per_issue is their ratio: above 1 the tensor core can be kept busy.
* bundles, product_bundles, products (TPU): instruction bundles of a straight pass, every loop body and branch once;
  those of basic blocks with products; and the products of a vector register with a matrix unit's tile. A bundle takes a
  cycle if nothing waits. bundles_per_product is product_bundles / products.
* matrix_share: of the cycles of that loop or those blocks, the part in which the tensor core or the matrix units work,
  if they overlap with all the rest: their cycles / max(their cycles, issue cycles or bundles).
* estimated_ms: the kernel's FLOP over (nominal peak times matrix_share; on TPU times the part of a matrix unit that a
  head fills). An ESTIMATE, from below: no waiting for memory, no tail, no masked half of a diagonal block,
  nothing outside the loop or the blocks. Only where the kernel's FLOP are known and products, not bytes, set the pace.
* cycles_outside (TPU): what XLA expects of the operations that it makes around the kernels.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.extend
from jax.sharding import NamedSharding, PartitionSpec
from sass import longest_loop

from jaxllm.parallel.topologies import GPUS, TPU_HOSTS, gpu_mesh, tpu_mesh

MULTIPROCESSORS = 132  # of H100 and H200
SHARED_MEMORY_LIMIT = 232448  # bytes a block of Hopper may have
# TPU: matrix units, their side, and the cycles that one takes for a register of 16-bit or 8-bit rows, half of them for
# 32-bit rows. With clocks of 1.5, 1.75, 1.75 and 2.2 GHz these make the peaks.
MATRIX_UNITS = {"v5e": (4, 128, 16), "v5p": (4, 128, 16), "v6e": (2, 256, 8), "v7": (2, 256, 8)}
# Nominal dense TFLOP/s of 16-bit numbers, of a GPU or of one TPU core (a chip of v5p or v7 has two): NVIDIA's data
# sheet and jax's tpu_info.py.
PEAK = {"h100": 989.4, "h200": 989.4, "v5e": 197.0, "v5p": 229.5, "v6e": 920.0, "v7": 1155.0}


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

  @property
  def matrix_share(self) -> float | None:
    """Of the loop's cycles those in which the tensor core works, if it overlaps with everything."""
    longest = max(self.loop_tensor_cycles, self.loop_issue_cycles)
    return self.loop_tensor_cycles / longest if self.loop_tensor_cycles else None


@dataclasses.dataclass(frozen=True)
class Bundles:
  """One TPU kernel as libtpu scheduled it: instruction bundles, of which each takes a cycle if nothing waits."""

  name: str
  bundles: int  # of one straight pass: every loop body once
  product_bundles: int  # of those basic blocks that have products
  products: int  # of a vector register with the tile that a matrix unit holds
  bundles_per_product: float | None
  matrix_unit: int  # all operations of the matrix units: loading tiles and taking results too
  spills: int  # vector registers stored and filled again
  matrix_share: float | None


def compile_tpu(function: Callable, avals: tuple, chip: str, **options) -> jax.stages.Compiled:
  """`function` compiled for one TPU chip ("v5e", "v5p", "v6e", "v7"); options as of `jax.jit`."""
  return _compile(function, avals, tpu_mesh(chip), "tpu", **options)


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
      (listing,) = dump.glob(f"{path.name.split('-')[0]}-{name}-*-final_bundles.txt")
      found.append(_read_bundles(name, path.read_text(), listing.read_text(), chip))
  shutil.rmtree(dump, ignore_errors=True)
  return compiled, found


def _read_bundles(name: str, utilization: str, listing: str, chip: str) -> Bundles:
  lines = utilization.split("UTILIZATION:\n")[-1].splitlines()
  rows = [[int(n) for n in line.split()] for line in lines if line.strip()]
  blocks: list[tuple[int, list[str]]] = []  # bundles and products of each basic block
  new = True
  for line in listing.splitlines():
    if not (bundle := re.match(r"\s*0x[0-9a-f]+\s+([A-Z]{2}:)?", line)):
      continue
    if new or bundle.group(1) or "Start region" in line:
      blocks.append((0, []))
    blocks[-1] = (blocks[-1][0] + 1, blocks[-1][1] + re.findall(r"\bvmatmul\.([\w.]+)", line))
    new = "End region" in line or "sbr.rel" in line
  blocks = [(count, kinds) for count, kinds in blocks if kinds]
  units, _, cycles = MATRIX_UNITS[chip]
  busy = [sum(cycles / (2 if "f32" in kind.split(".") else 1) for kind in kinds) / units for _, kinds in blocks]
  longest = sum(max(count, cycles) for (count, _), cycles in zip(blocks, busy))
  product_bundles, products = sum(count for count, _ in blocks), sum(len(kinds) for _, kinds in blocks)
  return Bundles(
    name=name,
    bundles=len(rows),
    product_bundles=product_bundles,
    products=products,
    bundles_per_product=round(product_bundles / products, 2) if products else None,
    matrix_unit=sum(row[0] for row in rows),
    spills=sum(row[6] + row[8] for row in rows),
    matrix_share=sum(busy) / longest if products else None,
  )


def compile_gpu(function: Callable, avals: tuple, chip: str = "h100") -> tuple[jax.stages.Compiled, list[MachineCode]]:
  """`function` compiled for one GPU, and the machine code of each of its Mosaic kernels.

  jaxlib reads the folder to dump to once, so all calls of a process share it.
  """
  dump = Path(os.environ.setdefault("MOSAIC_GPU_DUMP_TO", tempfile.mkdtemp(prefix="mosaic-gpu-")))
  before = set(dump.iterdir())
  compiled = _compile(function, avals, gpu_mesh(chip), "cuda")
  kernels = [path for path in set(dump.iterdir()) - before if path.suffix == ".ptx"]
  kernels.sort(key=lambda path: int(path.stem.rpartition("_")[2]))  # a process numbers its kernels
  return compiled, [_read(path) for path in kernels]


def abstract_mesh(mesh: jax.sharding.Mesh, platform: str) -> jax.sharding.AbstractMesh:
  """Where kernels that ask for the chip, or for its number of cores, find it."""
  from jax._src.mesh import AbstractDevice

  kind, cores = mesh.devices.flat[0].device_kind, MULTIPROCESSORS
  if platform == "tpu":
    cores = mesh.devices.flat[0].num_cores
  device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu" if platform == "tpu" else "gpu")
  return jax.sharding.AbstractMesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)


def _compile(function, avals, mesh, platform, **options):
  sharding = NamedSharding(mesh, PartitionSpec())
  avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), avals)
  with jax.sharding.use_abstract_mesh(abstract_mesh(mesh, platform)), _peers_believe_in(mesh):
    return jax.jit(function, **options).trace(*avals).lower(lowering_platforms=(platform,)).compile()


@contextlib.contextmanager
def _peers_believe_in(mesh):
  """Other people's kernels ask for the machine's own devices: those of the mesh answer."""
  with contextlib.ExitStack() as stack:
    devices = list(mesh.devices.flat)
    stack.enter_context(mock.patch.object(jax, "devices", lambda *_: devices))
    stack.enter_context(mock.patch.object(jax.extend.backend, "get_default_device", lambda: devices[0]))
    if importlib.util.find_spec("tokamax") is not None:
      from tokamax import config

      stack.enter_context(config.cross_compile(True))
    yield


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
  tensor_cycles, issue_cycles = longest_loop(sass)
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


def report(case, side: str, chip: str) -> list[dict]:
  """Rows of one side of a case: a row for each kernel, one without figures where there is none."""
  function = case.ours(backend_of(chip), chip) if side == "jaxllm" else case.others[side]
  start = time.perf_counter()
  compiled, kernels = (compile_gpu if chip in GPUS else schedules_tpu)(function, case.inputs, chip)
  shared = {"compile_s": round(time.perf_counter() - start, 1)}
  shared["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
  if chip not in GPUS:  # of what XLA makes around the kernels, which themselves count as none
    shared["cycles_outside"] = sum(int(n) for n in re.findall(r'"estimated_cycles":"?(\d+)', compiled.as_text()))
  flops = case.kernel_flops([kernel.name for kernel in kernels])
  rows = []
  for kernel, count in zip(kernels, flops):
    share = kernel.matrix_share
    row = dataclasses.asdict(kernel) | shared | {"matrix_share": None if share is None else round(share, 3)}
    if chip in GPUS and kernel.loop_issue_cycles:
      row["tensor_per_issue"] = round(kernel.loop_tensor_cycles / kernel.loop_issue_cycles, 2)
    row["name"] = re.sub(r"[._]\d+$", "", kernel.name)
    if count is not None and share:
      row["estimated_ms"] = round(count / (PEAK[chip] * 1e9 * share * _fill(case, chip)), 4)
    rows.append(row)
  return rows or [shared]


def _fill(case, chip) -> float:
  """Of a TPU's matrix unit the part that a narrow matrix uses."""
  side = MATRIX_UNITS[chip][1] if chip in MATRIX_UNITS else 1
  return case.width / (-(-case.width // side) * side) if case.width else 1.0


def backend_of(chip: str) -> str:
  return "mosaic_gpu" if chip in GPUS else "pallas_tpu"


def jobs(chips, ops, tags, match, peers) -> dict[tuple[str, str, str, str], object]:
  """(chip, op, case, side) -> case, in the order of the table."""
  from kernel_cases import cases
  from kernel_cases.peers import KERNELS

  found = {}
  for chip in chips:
    family = "hopper" if chip in GPUS else "tpu"
    for case in cases(family):
      if not (case.tags & tags) or not re.search(match, case.name) or (ops and case.op not in ops):
        continue
      sides = ["jaxllm", *(name for name in KERNELS[family] if name in case.others and peers)]
      found |= {(chip, case.op, case.name, side): case for side in sides}
  return found


def work(connection, every: tuple) -> None:
  """In a process of its own: compiles what it is asked for, until nothing more is asked."""
  table = jobs(*every)
  while (key := connection.recv()) is not None:
    try:
      rows = report(table[key], key[3], key[0])
    except Exception as error:  # a limit is a result too
      said = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
      rows = [{"refused": f"{type(error).__name__}: {said[0]}"[:240]}]
    connection.send(rows)


class Compiler:
  """A process that compiles for one chip. What kills a compiler, or keeps it for ever, costs one row."""

  def __init__(self, every: tuple, limit_s: float):
    self.every, self.limit_s, self.process = every, limit_s, None

  def __call__(self, key) -> list[dict]:
    if self.process is None:
      context = multiprocessing.get_context("spawn")
      self.connection, other = context.Pipe()
      self.process = context.Process(target=work, args=(other, self.every), daemon=True)
      self.process.start()
      other.close()
    self.connection.send(key)
    try:
      if self.connection.poll(self.limit_s):
        return self.connection.recv()
      said = f"not done after {self.limit_s:g} s"
    except EOFError:
      self.process.join()
      said = f"the compiler died with exit code {self.process.exitcode}"
    self.close()
    return [{"refused": said}]

  def close(self):
    if self.process is not None:
      self.process.kill()
      self.process.join()
      self.process = None


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chips", default="h100,v5e,v5p,v6e,v7")
  parser.add_argument("--ops", default="", help="comma list; default: all")
  parser.add_argument("--tags", default="target", help="comma list of target, shape, option")
  parser.add_argument("--match", default="", help="only cases whose name this regular expression finds")
  parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
  parser.add_argument("--out", default="", help="where to write the tables, without ending")
  parser.add_argument("--resume", action="store_true", help="leave out what the tables of --out have")
  parser.add_argument("--limit", type=float, default=900, help="seconds for one side of a case")
  args = parser.parse_args()
  chips = args.chips.split(",")
  tags = frozenset(args.tags.split(","))
  asked = jobs(chips, [op for op in args.ops.split(",") if op], tags, args.match, args.peers)
  everything = frozenset(("target", "shape", "option", "values"))
  order = {key: i for i, key in enumerate(jobs([*GPUS, *TPU_HOSTS], [], everything, "", True))}
  tables = {name: Table(args.out, name, order) for name in dict.fromkeys(map(table_of, chips))}
  if args.resume:
    asked = {key: case for key, case in asked.items() if not tables[table_of(key[0])].has(key)}
  compile_side, chip, start, failed = None, None, time.perf_counter(), False
  for i, key in enumerate(asked):
    if key[0] != chip:  # a compiler's flags and memory are one chip's
      if compile_side is not None:
        compile_side.close()
      chip = key[0]
      compile_side = Compiler(([chip], [], everything, "", True), args.limit)
    rows = compile_side(key)
    failed |= key[3] == "jaxllm" and "refused" in rows[0] and "ConfigError" not in rows[0]["refused"]
    tables[table_of(chip)].put(key, rows)
    print(f"[{i + 1}/{len(asked)}, {time.perf_counter() - start:.0f} s] {' | '.join(key)}")
    for row in rows:
      print("    " + ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
  if compile_side is not None:
    compile_side.close()
  if failed:
    raise SystemExit("some of our kernels did not compile")


def table_of(chip: str) -> str:
  return chip if chip in GPUS else "tpu"


class Table:
  """The rows of one family of chips, in a file that is whole after every side."""

  GPU = ("registers", "spill_bytes", "local", "shared_bytes", "tensor_core", "tma", "instructions")
  GPU += ("loop_tensor_cycles", "loop_issue_cycles", "tensor_per_issue")
  TPU = ("bundles", "product_bundles", "products", "bundles_per_product", "matrix_unit", "spills", "cycles_outside")
  SHARED = ("matrix_share", "estimated_ms", "temp_bytes", "compile_s")

  def __init__(self, out: str, name: str, order: dict):
    self.path, self.name, self.order = (Path(f"{out}_{name}.json") if out else None), name, order
    self.rows: dict[tuple, list[dict]] = {}
    if self.path is not None and self.path.exists():
      for row in json.loads(self.path.read_text())["rows"]:
        self.rows.setdefault(tuple(row[field] for field in ("chip", "op", "case", "side")), []).append(row)
    self.rows = {key: rows for key, rows in self.rows.items() if key in order}  # cases that are no more

  def has(self, key) -> bool:
    return key in self.rows

  def put(self, key, rows):
    facts = dict(zip(("chip", "op", "case", "side"), key)) | {"commit": commit()}
    self.rows[key] = [facts | row for row in rows]
    if self.path is None:
      return
    rows = [row for key in sorted(self.rows, key=self.order.__getitem__) for row in self.rows[key]]
    record = {"versions": versions(), "command": "python " + " ".join(sys.argv), "rows": rows}
    self.path.parent.mkdir(parents=True, exist_ok=True)
    for path, text in (
      (self.path, json.dumps(record, indent=1) + "\n"),
      (self.path.with_suffix(".md"), self.markdown(rows, record)),
    ):
      path.with_suffix(".part").write_text(text)
      path.with_suffix(".part").replace(path)

  def markdown(self, rows: list[dict], record: dict) -> str:
    """The table as people read it."""
    columns = ("chip", "op", "case", "side", "name", *(self.TPU if self.name == "tpu" else self.GPU), *self.SHARED)
    said = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
      f"# Machine code of the kernels: {'TPU' if self.name == 'tpu' else self.name.upper()}\n",
      f"Compiled ahead of time, nothing was run. {said}. Last part made by `{record['command']}`; what the"
      " columns say is in tools/machine_code.py.\n",
      "| " + " | ".join(columns) + " |",
      "|" + "---|" * len(columns),
    ]
    for row in rows:
      cells = ["" if row.get(column) is None else str(row[column]) for column in columns]
      if "refused" in row:
        cells[columns.index("name")] = "refused: " + row["refused"].replace("|", "/")
      lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@functools.cache
def commit() -> str:
  """Of this checkout, with a + where it was changed."""
  git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()  # noqa: E731
  changed = git("status", "--porcelain", "--untracked-files=no", "--", "jaxllm", "tools")
  return git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")


@functools.cache
def versions() -> dict[str, str]:
  names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "tokamax")
  found = {}
  for name in names:
    with contextlib.suppress(metadata.PackageNotFoundError):
      found[name] = metadata.version(name)
  return found


if __name__ == "__main__":
  main()

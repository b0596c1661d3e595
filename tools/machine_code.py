"""What a kernel becomes on a chip that is not here: compiled ahead of time, read from the compiler's own output.

    JAX_PLATFORMS=cpu python tools/machine_code.py            # the table of every kernel, as Markdown
    JAX_PLATFORMS=cpu python tools/machine_code.py --write    # ... into experiments/kernels/machine_code.json and .md

TPU: libtpu compiles, so a block that does not fit the vector memory is an error. H100: Mosaic GPU writes PTX, ptxas
makes machine code of it, and nvdisasm lists the instructions. Needs Python 3.12, jax 0.11, libtpu, jax's CUDA plugin,
ptxas and nvdisasm (`pip install -e '.[aot]'`).
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
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


def compile_tpu(function: Callable, avals: tuple, chip: str) -> jax.stages.Compiled:
  """`function` compiled for one TPU chip ("v5e", "v5p", "v6e", "v7")."""
  return _compile(function, avals, tpu_mesh(chip), "tpu")


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
  )

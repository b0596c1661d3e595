"""Builds and registers the C++ kernels of `kernels/cpu/` as XLA custom calls (CPU only).

The sources are compiled with the machine's own `g++ -march=native` at first use, into a cache folder whose name
holds a hash of the sources, the compiler, jaxlib and the CPU's features; later processes load the file. Where there
is no compiler or the CPU lacks AVX-512, `available()` is False and callers use their plain XLA form.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jaxlib
from jaxtyping import Array

log = logging.getLogger("jaxllm")
SOURCES = pathlib.Path(__file__).with_name("cpu")
TARGETS = (
  "cpu_matmul",
  "cpu_matmul_plus",
  "cpu_matmul_in_order",
  "cpu_attention",
  "cpu_attention_grad",
  "cpu_attention_in_order",
  "cpu_cross_entropy",
  "cpu_logit_statistics",
  "cpu_decode",
  "cpu_few",
  "cpu_layers",
  "cpu_quantized_matmul",
  "cpu_quantized_matmul_in_order",
  "cpu_layer_norm",
  "cpu_copy",
  "cpu_rms_norm",
  "cpu_rms_norm_grad",
  "cpu_swiglu",
  "cpu_swiglu_grad",
  "cpu_rope",
)
NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w")


class BuildError(RuntimeError):
  """The compiler refused the kernels; the message holds what it said."""


@functools.cache
def cpu_flags() -> frozenset[str]:
  """Feature flags of this CPU as Linux names them; empty where that is unknown."""
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("flags"):
        return frozenset(line.split(":", 1)[1].split())
  except OSError:
    pass
  return frozenset()


def why_unavailable() -> str | None:
  """One line that says why the C++ kernels cannot run here, or None if they can (as far as is known unbuilt)."""
  if platform.system() != "Linux" or platform.machine() != "x86_64":
    return f"the C++ kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
  if missing := NEEDED - cpu_flags():
    return f"this CPU lacks {', '.join(sorted(missing))}"
  if not compiler():
    return "no C++ compiler (g++) was found; set CXX or install one"
  return None


def compiler() -> str:
  """The C++ compiler: $CXX, else g++; "" if there is none."""
  return shutil.which(os.environ.get("CXX", "g++")) or ""


def cache_dir() -> pathlib.Path:
  """Where built libraries are kept: $JAXLLM_CACHE_DIR, else ~/.cache/jaxllm."""
  root = os.environ.get("JAXLLM_CACHE_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "jaxllm")
  return pathlib.Path(root) / "cpu_kernels"


def _key() -> str:
  """Hash of everything that the built library depends on."""
  version = subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout
  h = hashlib.sha256("\n".join([version, jaxlib.__version__, *FLAGS, *sorted(cpu_flags())]).encode())
  for path in sorted(SOURCES.iterdir()):
    h.update(path.name.encode() + path.read_bytes())
  return h.hexdigest()[:16]


def build() -> pathlib.Path:
  """Compiles the kernels unless this CPU's build is in the cache. Returns the library; raises BuildError."""
  library = cache_dir() / f"{_key()}.so"
  if library.exists():
    return library
  log.info("compiling the CPU kernels, once for this machine")
  library.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=library.parent) as tmp:  # then an atomic rename: builds may race
    objects, running = [], []
    for source in sorted(SOURCES.glob("*.cc")):
      objects.append(f"{tmp}/{source.stem}.o")
      flags = [f for f in FLAGS if f != "-shared"]
      running.append(
        subprocess.Popen(
          [compiler(), *flags, f"-I{jax.ffi.include_dir()}", "-c", str(source), "-o", objects[-1]],
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    errors = [p.communicate()[1] for p in running]
    if any(p.returncode for p in running):
      raise BuildError("compiling the CPU kernels failed:\n" + "\n".join(errors)[-4000:])
    subprocess.run([compiler(), "-shared", *objects, "-o", f"{tmp}/out.so"], check=True)
    os.replace(f"{tmp}/out.so", library)
  return library


@functools.cache
def load() -> None:
  """Builds (if need be), loads and registers every kernel once per process. Raises BuildError or RuntimeError."""
  if reason := why_unavailable():
    raise RuntimeError(reason)
  lib = ctypes.cdll.LoadLibrary(str(build()))
  for name in TARGETS:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(lib, name)), platform="cpu")


@functools.cache
def available() -> bool:
  """True if the C++ kernels run here (builds them at the first call); what stands in the way is logged once.

  JAXLLM_CPU_KERNELS=0 switches them off.
  """
  reason = "JAXLLM_CPU_KERNELS is 0" if os.environ.get("JAXLLM_CPU_KERNELS", "1") == "0" else why_unavailable()
  if reason is None:
    try:
      load()
      return True
    except (BuildError, OSError) as error:
      reason = str(error)
  log.warning("the CPU runs without its C++ kernels, at half the speed (a quarter in bfloat16): %s", reason)
  return False


def keep_memory_resident() -> bool:
  """Tells glibc to keep freed memory instead of returning it, so a step's buffers are not faulted in again each step.

  For programs whose main business is a training loop; worth 12% of a float32 step. One arena, because a buffer
  that outgrows a thread's own arena is mapped and unmapped each time whatever the other settings say: call it before
  jax starts its threads. False where there is no glibc.
  """
  try:
    mallopt = ctypes.CDLL("libc.so.6").mallopt
  except (OSError, AttributeError):
    return False
  M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
  settings = {M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 64 << 20}
  return all([mallopt(name, value) for name, value in settings.items()])


def release_memory(beyond: int) -> None:
  """Gives freed memory back once this process holds more than so many bytes of it: the bound of
  `keep_memory_resident`.

  glibc seldom fits an aligned array into a hole of its own size, so holes between arrays that live on pile up: full
  fine-tuning of 135M parameters grew by a step's memory every few steps. A hole that nothing fits costs nothing once
  it is given back; others are faulted in again. Nothing happens where there is no glibc from 2.33 on.
  """
  with contextlib.suppress(OSError, AttributeError):
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _MallocFigures
    held = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if held - libc.mallinfo2().uordblks > beyond:
      libc.malloc_trim(ctypes.c_size_t(0))


class _MallocFigures(ctypes.Structure):
  """The ten figures of mallinfo2(3); uordblks: bytes in use."""

  _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
  _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def call(name: str, result: Any, *args: Array, aliases: Mapping[int, int] | None = None, **attributes: Any) -> Any:
  """`jax.ffi.ffi_call` of one of TARGETS; `result`: ShapeDtypeStruct(s). vmap runs it once per element.

  Args:
    aliases: which argument's memory a result takes.
  """
  load()
  how: dict[str, Any] = dict(vmap_method="sequential", input_output_aliases=None if aliases is None else dict(aliases))
  return jax.ffi.ffi_call(name, result, **how)(*args, **attributes)

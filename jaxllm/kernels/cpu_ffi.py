"""Registers the C++ kernels of `kernels/cpu/` as XLA custom calls (CPU only).

`cpu_library` compiles them with the machine's own `g++ -march=native` at first use. Where there is no compiler, it
fails, or the CPU lacks AVX-512, `available()` is False and callers use their plain XLA form.
"""

import contextlib
import ctypes
import functools
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array

from jaxllm.base import environment
from jaxllm.kernels import cpu_library
from jaxllm.kernels.cpu_library import SOURCES, BuildError, cache_dir, cpu_flags, why_unavailable

__all__ = ["SOURCES", "BuildError", "available", "cache_dir", "call", "cpu_flags", "missing", "why_unavailable"]

log = logging.getLogger("jaxllm")


def targets() -> tuple[str, ...]:
  """The kernels' names, as the sources define them."""
  sources = (path.read_text() for path in sorted(SOURCES.glob("*.cc")))
  return tuple(name for source in sources for name in re.findall(r"^HANDLER\((\w+)", source, re.MULTILINE))


@functools.cache
def load() -> None:
  """Builds (if need be), loads and registers every kernel once per process. Raises BuildError or RuntimeError."""
  if reason := why_unavailable():
    raise RuntimeError(reason)
  names = targets()
  library = cpu_library.load(names)
  for name in names:
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")


@functools.cache
def missing() -> str | None:
  """Why there are no C++ kernels, None where they run (builds them at the first call); it is logged once.

  JAXLLM_CPU_KERNELS=0 switches them off.
  """
  reason = why_unavailable() if environment.flag("JAXLLM_CPU_KERNELS", True) else "JAXLLM_CPU_KERNELS is 0"
  if reason is None:
    try:
      load()
    except BuildError as error:
      reason = str(error)
  if reason is not None:
    log.warning("the CPU runs without its C++ kernels, at half the speed (a quarter in bfloat16): %s", reason)
  return reason


def available() -> bool:
  """Whether the C++ kernels run here; see `missing`."""
  return missing() is None


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
  """`jax.ffi.ffi_call` of one of `targets`; `result`: ShapeDtypeStruct(s). vmap runs it once per element.

  Args:
    aliases: which argument's memory a result takes.
  """
  load()
  how: dict[str, Any] = dict(vmap_method="sequential", input_output_aliases=None if aliases is None else dict(aliases))
  return jax.ffi.ffi_call(name, result, **how)(*args, **attributes)

"""Running Pallas kernels on a CPU: emulators of a TPU core and of a Hopper GPU, with race detection.

    with gpu_emulator():            # or tpu_emulator()
      out = jax.jit(call)(...)      # traced and run inside

Both raise if a race was seen. They need jax >= 0.11 (`needs_emulators` skips elsewhere). A barrier that nobody
signals hangs for ever, so the body has a deadline, after which the process dumps its stacks and ends.

A warpgroup that waits on a barrier may hold one of XLA's threads, of which there are as many as cores or as CPU
devices, whichever is more. With two, other warpgroups found none to go on with, and a kernel hung with which nothing
was wrong; so the GPU's emulator asks for more.
"""

import contextlib
import faulthandler
import os

import jax
import pytest

THREADS = 8  # that XLA must have: more than a block has warpgroups
RECENT = tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)
needs_emulators = pytest.mark.skipif(not RECENT, reason=f"Pallas' emulators need jax 0.11, this is {jax.__version__}")


@contextlib.contextmanager
def tpu_emulator(timeout: float = 300):
  """Pallas TPU kernels run in the emulator; a race is an error."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as state
  from jax.experimental.pallas import tpu as pltpu

  pltpu.set_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
  with _cleanly(pltpu.set_tpu_interpret_mode, pltpu.reset_tpu_interpret_mode_state, timeout):
    yield
    jax.effects_barrier()
    assert state.races is None or not state.races.races_found, "the emulator saw a race (printed above)"


@contextlib.contextmanager
def gpu_emulator(timeout: float = 300):
  """Mosaic GPU kernels run in the emulator, as `hopper_emulation` improves it; a race is an error."""
  import hopper_emulation
  import jax.experimental.pallas.mosaic_gpu as plgpu
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as state

  if max(os.cpu_count() or 1, jax.local_device_count(backend="cpu")) < THREADS:
    raise RuntimeError(f"set XLA_FLAGS=--xla_force_host_platform_device_count={THREADS} before jax starts")
  hopper_emulation.teach()
  plgpu.set_gpu_interpret_mode(hopper_emulation.parameters())
  with _cleanly(plgpu.set_gpu_interpret_mode, state.reset_gpu_interpret_mode_state, timeout):
    yield
    jax.effects_barrier()
    try:
      races = state.get_races()
    except Exception:  # no kernel ran
      races = None
    assert races is None or not races.races_found, "the emulator saw a race (printed above)"


@contextlib.contextmanager
def _cleanly(set_mode, reset, timeout):
  faulthandler.dump_traceback_later(timeout, exit=True)
  try:
    yield
  finally:
    faulthandler.cancel_dump_traceback_later()
    set_mode(None)
    with contextlib.suppress(Exception):  # nothing to reset if no kernel ran
      reset()

"""Running Pallas kernels on a CPU: emulators of a TPU core and of a Hopper GPU, with race detection.

    with gpu_emulator():            # or tpu_emulator()
      out = jax.jit(call)(...)      # traced and run inside

Both raise if a race was seen. They need jax >= 0.11 (`needs_emulators` skips elsewhere). A barrier that nobody
signals hangs for ever, so the body has a deadline, after which the process dumps its stacks and ends.
"""

import contextlib
import faulthandler

import jax
import pytest

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

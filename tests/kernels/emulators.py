"""Running Pallas kernels on a CPU: emulators of a TPU core and of a Hopper GPU, with race detection.

    with gpu_emulator():            # or tpu_emulator()
      out = jax.jit(call)(...)      # traced and run inside

Both raise if a race was seen. They need jax >= 0.11 (`needs_emulators` skips elsewhere). A barrier that nobody
signals hangs for ever, so the body has a deadline, after which the process dumps its stacks and ends.
"""

import contextlib
import faulthandler

import jax
import numpy as np
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
  """Mosaic GPU kernels run in the emulator; a race is an error."""
  import jax.experimental.pallas.mosaic_gpu as plgpu
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as state

  _teach_gpu_emulator()
  plgpu.set_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
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


_taught = False


def _teach_gpu_emulator():
  """What jax 0.11's Mosaic GPU emulator does not know, and kernels of Hopper need.

  Accumulators that start from a value (`pl.run_state`, stores), a left operand of wgmma in registers; and it
  holds to be errors a barrier's last phase that nobody waits for, and two writes to an accumulator.
  """
  global _taught
  if _taught:
    return
  _taught = True
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu
  from jax._src.pallas.mosaic_gpu import core
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, race_detection_state, shared_memory
  from jax._src.pallas.mosaic_gpu.interpret import params as params_lib
  from jax._src.state import types as state_types

  def interpreted():
    from jax._src import config

    return isinstance(config.pallas_tpu_interpret_mode_context_manager.value, params_lib.InterpretGPUParams)

  real_run_state, real_set = pl.run_state, core.WGMMAAbstractAccumulatorRef._setitem

  def run_state(function):
    def run(init):
      if not interpreted():
        return real_run_state(function)(init)
      leaves, tree = jax.tree.flatten(init, is_leaf=lambda x: isinstance(x, plgpu.ACC))

      def body(*refs):
        for ref, leaf in zip(refs, leaves):
          ref[...] = leaf._init
        function(tree.unflatten(refs))
        return tree.unflatten([ref[...] for ref in refs])

      return pl.run_scoped(body, *(plgpu.ACC(leaf.shape, leaf.dtype) for leaf in leaves))

    return run

  def set_item(self, tracer, idx, value):
    if interpreted():
      return state_types.AbstractRef._setitem(self, tracer, idx, value)
    return real_set(self, tracer, idx, value)

  real_wgmma = gpu_callbacks.wgmma

  def wgmma(*, a_allocation_key_as_array, a_transforms, token, **rest):
    a = np.asarray(a_allocation_key_as_array)
    if a.ndim != 2:
      return real_wgmma(
        a_allocation_key_as_array=a_allocation_key_as_array, a_transforms=a_transforms, token=token, **rest
      )
    # The same callback with its left operand put into a buffer of the accumulator's own kind would need an
    # allocation; reading the other two and adding the product is all that it does.
    memory = gpu_callbacks._get_shared_memory()
    thread, info = rest["thread"], rest.get("source_info")
    logging_info = shared_memory.GPULoggingInfo(rest["mesh_location"], thread, info)

    def access(name):
      key = gpu_callbacks.HostAllocationKey.from_array(rest[f"{name}_allocation_key_as_array"])
      transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(rest[f"{name}_transforms"]))
      where = memory.access(key, transforms)
      return key, where, memory.get_buffer_content(key, where, thread, logging_info=logging_info)[0]

    _, _, b = access("b")
    key, where, acc = access("acc")
    total = acc + np.matmul(a.astype(acc.dtype), np.asarray(b).astype(acc.dtype))
    memory.store_buffer_content(key, where, total, thread, logging_info=logging_info)
    return token

  real_deallocate = shared_memory.Barrier.deallocate

  def deallocate(self):
    try:
      real_deallocate(self)
    except ValueError as error:
      if "had only" not in str(error):
        raise

  registers = shared_memory.get_memory_space_idx(plgpu.MemorySpace.REGS)
  real_check = race_detection_state.GPURaceDetectionState.check_write

  def check_write(self, thread, clock, buffer_key, *rest, **named):
    if buffer_key.memory_space_id != registers:  # an accumulator is its thread's own
      real_check(self, thread, clock, buffer_key, *rest, **named)

  race_detection_state.GPURaceDetectionState.check_write = check_write
  pl.run_state, gpu_callbacks.wgmma = run_state, gpu_callbacks.fail_on_exception(wgmma)
  core.WGMMAAbstractAccumulatorRef._setitem = set_item
  shared_memory.Barrier.deallocate = deallocate

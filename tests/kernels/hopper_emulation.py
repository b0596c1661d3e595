"""What jax 0.11's emulator of Mosaic GPU does not know, and kernels for Hopper need.

- A product of the tensor cores (wgmma) runs as late as the program allows: queued where it is issued, its operands read
  and its sum written where a wait forces it. `wgmma` commits one group; a wait for n leaves the newest n under way;
  `acc[...]` waits for all, `wgmma_accumulator_load(acc, wait_n=n)` for all but n, the end of `pl.run_state` for all,
  that of `pl.run_scoped` for none (jax/_src/pallas/mosaic_gpu: primitives.py, lowering.py). Shared memory is read
  through the async proxy, so that what threads have written must be committed (`commit_smem`) before, and a slot must
  not be handed back before the wait; both are races otherwise. An accumulator that is read, overwritten or dropped
  while a product for it is under way is an error.
- Accumulators may start from a value (`pl.run_state`, stores); wgmma's left operand may be in registers.
- A barrier's phase must not complete before all who wait on the barrier have, by the program's own order, seen the
  phase before: hardware keeps one bit of the phase, and who comes too late waits for ever. The emulator alone sees
  this only if the threads happen to run that way.
- Blocks run one after another here, but must not write to the same place: which one comes last is chance on a chip.
- A barrier's last phase need not be waited for, and two writes to an accumulator are no race.
- More pseudo-threads of the copy engine: two copies that share one look ordered.
"""

import collections
import dataclasses
import threading
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src import config
from jax._src.pallas.mosaic_gpu import core, primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, race_detection_state, shared_memory
from jax._src.pallas.mosaic_gpu.interpret import params as params_lib
from jax._src.state import types as state_types

COPIES = 64  # that race detection tells apart
REGISTERS, GLOBAL = (shared_memory.get_memory_space_idx(plgpu.MemorySpace[name]) for name in ("REGS", "GMEM"))
PRODUCTS = "products"  # marks a wait for copies as one for products: interpreters of jax 0.11 drop the latter


def parameters():
  """Of the emulator."""
  return plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=COPIES)


def _interpreted():
  return isinstance(config.pallas_tpu_interpret_mode_context_manager.value, params_lib.InterpretGPUParams)


# ---------------------------------------------------------------- products


@dataclasses.dataclass(frozen=True)
class Product:
  """A wgmma under way. Operands: (key, access) of a buffer, or for the left one an array."""

  acc: tuple[Any, Any]
  a: Any
  b: tuple[Any, Any]
  clock: Any
  source_info: Any

  def perform(self, memory, thread, mesh_location):
    info = shared_memory.GPULoggingInfo(mesh_location, thread, self.source_info)

    def operand(x):
      if isinstance(x, np.ndarray):
        return x
      key, access = x
      if self.clock is not None:
        clock = self.clock.async_smem_clock
        gpu_callbacks.get_races().check_read(thread, clock, key, access, source_info=self.source_info)
      value = memory.get_buffer_content(key, access, None, logging_info=info)[0]
      if value is None or value.shape != access.shape:
        raise IndexError(f"wgmma reads [{access}] of {key}, which is smaller")
      return value

    a, b = operand(self.a), operand(self.b)
    acc = memory.get_buffer_content(*self.acc, None, logging_info=info)[0]
    wide = np.float64 if np.issubdtype(acc.dtype, np.integer) else acc.dtype  # exact for 8 bits, and fast
    with np.errstate(all="ignore"):  # NaN and infinity are products like others
      total = acc + np.matmul(a.astype(wide), b.astype(wide)).astype(acc.dtype)
    memory.store_buffer_content(*self.acc, total, thread, increment_clock=False, logging_info=info)


def _wait(memory, thread, mesh_location, n):
  """No more than n products of the thread stay under way."""
  queue = memory.products[thread]
  while len(queue) > n:
    product = queue[0]
    product.perform(memory, thread, mesh_location)
    queue.popleft()
    if product.clock is not None:
      with memory.lock:
        memory.clocks[thread].update(product.clock)


def _must_be_idle(memory, thread, key, what):
  if any(product.acc[0] == key for product in memory.products[thread]):
    raise ValueError(f"an accumulator is {what} while a product for it is under way")


def _wgmma(
  *,
  token,
  mesh_location,
  thread,
  acc_allocation_key_as_array,
  acc_transforms,
  a_allocation_key_as_array,
  a_transforms,
  b_allocation_key_as_array,
  b_transforms,
  source_info=None,
):
  memory = gpu_callbacks._get_shared_memory()

  def buffer(key, transforms):
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    return key, memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))

  a = np.array(a_allocation_key_as_array)
  clock = None
  if memory.detect_races:
    clock = memory.incr_clock(thread)
    # The tensor core has a place in the clocks, that of a warp, which no kernel of ours uses as a thread of its own:
    # products complete in order, so that their number is the time.
    memory.issued[thread] += 1
    engine = memory.thread_to_vc_position(thread.warp(0))
    for part in (clock.generic_clock, clock.async_smem_clock):
      part.clock[engine] = memory.issued[thread]
  memory.products[thread].append(
    Product(
      buffer(acc_allocation_key_as_array, acc_transforms),
      a if a.ndim == 2 else buffer(a_allocation_key_as_array, a_transforms),
      buffer(b_allocation_key_as_array, b_transforms),
      clock,
      source_info,
    )
  )
  return token


def _wgmma_wait(*, token, mesh_location, thread, n):
  _wait(gpu_callbacks._get_shared_memory(), thread, mesh_location, int(n))
  return token


def _teach_products():
  real_deref, real_swap = gpu_callbacks.wgmma_accumulator_deref, gpu_callbacks._swap
  real_deallocate, real_finished = gpu_callbacks._deallocate_buffer, gpu_callbacks.kernel_thread_finished
  wgmma_wait = gpu_callbacks.fail_on_exception(_wgmma_wait)

  def key_of(array):
    return gpu_callbacks.HostAllocationKey.from_array(array)

  def deref(*, token, mesh_location, thread, acc_allocation_key_as_array, wait_n, source_info=None):
    memory = gpu_callbacks._get_shared_memory()
    if wait_n is not None:
      _wait(memory, thread, mesh_location, int(wait_n))
    _must_be_idle(memory, thread, key_of(acc_allocation_key_as_array), "read")
    return real_deref(
      token=token,
      mesh_location=mesh_location,
      thread=thread,
      acc_allocation_key_as_array=acc_allocation_key_as_array,
      wait_n=wait_n,
      source_info=source_info,
    )

  def swap(token, mesh_location, thread, allocation_key_as_array, *rest, **named):
    memory = gpu_callbacks._get_shared_memory()
    _must_be_idle(memory, thread, key_of(allocation_key_as_array), "overwritten")
    return real_swap(token, mesh_location, thread, allocation_key_as_array, *rest, **named)

  def deallocate(token, mesh_location, thread, allocation_key_as_array, source_info=None):
    memory = gpu_callbacks._get_shared_memory()
    _must_be_idle(memory, thread, key_of(allocation_key_as_array), "dropped")
    return real_deallocate(token, mesh_location, thread, allocation_key_as_array, source_info)

  def finished(*, token, mesh_location, thread):
    if gpu_callbacks._get_shared_memory().products[thread]:
      raise ValueError("a kernel ends while products are under way")
    return real_finished(token=token, mesh_location=mesh_location, thread=thread)

  for name, function in (
    ("wgmma", _wgmma),
    ("wgmma_accumulator_deref", deref),
    ("_swap", swap),
    ("_deallocate_buffer", deallocate),
    ("kernel_thread_finished", finished),
  ):
    setattr(gpu_callbacks, name, gpu_callbacks.fail_on_exception(function))

  real_reset = shared_memory.GPUSharedMemory.reset_per_cluster_state

  def reset(self):
    real_reset(self)
    self.products = collections.defaultdict(collections.deque)
    self.issued = collections.Counter()
    self.block = getattr(self, "block", -1) + 1

  shared_memory.GPUSharedMemory.reset_per_cluster_state = reset

  interpreter = jaxpr_interpret.JaxprInterpreter
  real_interpret, real_wait = interpreter.interpret, interpreter._interpret_wait_smem_to_gmem_p

  def interpret(self, jaxpr, token, *args):
    def seen(eqn):
      if eqn.primitive is not primitives.wgmma_wait_p:
        return eqn
      return eqn.replace(primitive=primitives.wait_smem_to_gmem_p, params=eqn.params | {"wait_read_only": PRODUCTS})

    if any(eqn.primitive is primitives.wgmma_wait_p for eqn in jaxpr.eqns):
      jaxpr = jaxpr.replace(eqns=[seen(eqn) for eqn in jaxpr.eqns])
    return real_interpret(self, jaxpr, token, *args)

  def wait(self, eqn, token, get_invals):
    if eqn.params["wait_read_only"] != PRODUCTS:
      return real_wait(self, eqn, token, get_invals)
    where = {"mesh_location": self.mesh_location, "thread": self.thread, "n": eqn.params["n"]}
    shape = gpu_callbacks.TOKEN_SHAPE_DTYPE
    return jaxpr_interpret.callback.io_callback(wgmma_wait, shape, token=token, **where), []

  interpreter.interpret, interpreter._interpret_wait_smem_to_gmem_p = interpret, wait


# ---------------------------------------------------------------- accumulators that start from a value


def _teach_accumulators():
  real_run_state, real_set = pl.run_state, core.WGMMAAbstractAccumulatorRef._setitem

  def run_state(function):
    def run(init):
      if not _interpreted():
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
    if _interpreted():
      return state_types.AbstractRef._setitem(self, tracer, idx, value)
    return real_set(self, tracer, idx, value)

  pl.run_state, core.WGMMAAbstractAccumulatorRef._setitem = run_state, set_item


# ---------------------------------------------------------------- writes


def _teach_writes():
  real_check = race_detection_state.GPURaceDetectionState.check_write

  def check_write(self, thread, clock, buffer_key, access, source_info=None):
    if buffer_key.memory_space_id == REGISTERS:  # an accumulator is its thread's own
      return
    real_check(self, thread, clock, buffer_key, access, source_info=source_info)
    if buffer_key.memory_space_id != GLOBAL:
      return
    memory = gpu_callbacks._get_shared_memory()
    with self.lock:
      writers = self.__dict__.setdefault("writers", {})  # buffer -> the block that wrote each element
      if buffer_key not in writers:
        writers[buffer_key] = np.full(memory.buffer_shape_and_dtype(buffer_key).shape, -1, np.int32)
      others = (writers[buffer_key][access.range] != -1) & (writers[buffer_key][access.range] != memory.block)
      writers[buffer_key][access.range] = memory.block
      if others.any():
        print(f"RACE DETECTED\n  two blocks write {buffer_key}[{access}]")
        self.races_found = True

  race_detection_state.GPURaceDetectionState.check_write = check_write


# ---------------------------------------------------------------- barriers


def _teach_barriers():
  barrier = shared_memory.Barrier
  real_init, real_deallocate, real_arrive, real_wait = (
    barrier.__init__,
    barrier.deallocate,
    barrier.arrive,
    barrier._wait,
  )

  def init(self, *args, **named):
    real_init(self, *args, **named)
    self.lock = threading.Lock()
    self.seen = {}  # thread -> (phases it has seen, its own time when it saw the last one)

  def deallocate(self):
    try:
      real_deallocate(self)
    except ValueError as error:
      if "had only" not in str(error):
        raise

  def wait(self, thread, logging_info=None):
    real_wait(self, thread, logging_info)
    memory = self.shared_memory
    if memory.detect_races:
      clock = memory.incr_clock(thread).generic_clock.clock
      with self.lock:
        self.seen[thread] = self.seen.get(thread, (0, 0))[0] + 1, clock[memory.thread_to_vc_position(thread)]

  def arrive(self, thread, clock=None, logging_info=None):
    memory = self.shared_memory
    with self.lock:
      if memory.detect_races and self.arrivals_count + 1 == self.num_arrivals:
        known = clock.generic_clock.copy()
        if self.clock is not None:
          known.update(self.clock.generic_clock)
        for waiter, (count, time) in self.seen.items():
          if count < self.phase or known.clock[memory.thread_to_vc_position(waiter)] < time:
            raise ValueError(f"a barrier's phase {self.phase} ends while {waiter} may still wait for the one before")
      real_arrive(self, thread, clock, logging_info)

  barrier.__init__, barrier.deallocate, barrier.arrive, barrier._wait = init, deallocate, arrive, wait


_taught = False


def teach():
  """Once for a process."""
  global _taught
  if not _taught:
    _taught = True
    _teach_products()
    _teach_accumulators()
    _teach_writes()
    _teach_barriers()

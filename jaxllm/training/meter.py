"""How fast a run goes: tokens per second, step time, model FLOP/s utilisation, memory."""

import collections
import concurrent.futures
import contextlib
import resource
import sys
import time
from typing import Any

import jax

from jaxllm.base.chips import CHIPS
from jaxllm.parallel.mesh import target_of
from jaxllm.training import flops
from jaxllm.training.compile import Program


class Meter:
  """Times steps by when the devices are done with them, whenever the loop looks; a context manager.

  The loop reads a step's metrics after it has dispatched the next one, and some devices compute while they are being
  given work and others later, so the moments of reading say nothing of single steps: a thread waits for each of them.
  """

  def __init__(self, program: Program):
    self._tokens_per_step = program.tokens_per_step
    self._flops_per_token = flops.row_flops(
      program.model, *program.row_lengths, train_weights=program.trains_weights
    ).total
    self._device, self._devices = program.mesh.local_devices[0], program.mesh.size
    self._peak = CHIPS[target_of(program.mesh)].flops
    self._waiter = concurrent.futures.ThreadPoolExecutor(1, "meter")
    self._ends: collections.deque[concurrent.futures.Future[float]] = collections.deque()
    self._last, self._steps, self._seconds = time.monotonic(), 0, 0.0

  def __enter__(self) -> "Meter":
    return self

  def __exit__(self, *error) -> None:
    self._waiter.shutdown(wait=False, cancel_futures=True)

  def dispatched(self, result: Any) -> None:
    """A step is on its way; `result` is something that it computes and that nobody donates."""
    self._ends.append(self._waiter.submit(lambda: (jax.block_until_ready(result), time.monotonic())[1]))

  def finished(self) -> None:
    """The oldest step on its way is done: its time ran from the end of the step, or of the pause, before it."""
    end = self._ends.popleft().result()
    self._seconds += end - self._last
    self._steps += 1
    self._last = end

  @contextlib.contextmanager
  def pause(self):
    """The time inside (evaluation, saving) does not count; no step may be on its way."""
    yield
    self._last = time.monotonic()

  def rates(self) -> dict[str, float]:
    """tokens_per_second, step_time_s, memory_gib and, of a chip whose peak is known, mfu since the last call."""
    step_time = self._seconds / max(self._steps, 1)
    tokens_per_second = self._tokens_per_step / max(step_time, 1e-9)
    self._steps, self._seconds = 0, 0.0
    rates = {
      "tokens_per_second": tokens_per_second,
      "step_time_s": step_time,
      "memory_gib": _peak_memory(self._device) / 2**30,
    }
    if self._peak is not None:
      rates["mfu"] = flops.mfu(tokens_per_second, self._flops_per_token, self._devices, self._peak)
    return rates


def _peak_memory(device: jax.Device) -> float:
  """Peak bytes on the device; on a CPU the process's peak resident size."""
  if device.platform == "cpu":
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
  return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)

"""How fast a run goes: tokens per second, step time, model FLOP/s utilisation, memory."""

import contextlib
import resource
import sys
import time

import jax

from jaxllm.training import flops
from jaxllm.training.compile import Program


class Meter:
  """Counts steps between two readings; time spent in `pause` (evaluation, saving) is left out."""

  def __init__(self, program: Program):
    self._tokens_per_step = program.tokens_per_step
    self._flops_per_token = flops.row_flops(program.model, *program.row_lengths).total
    self._chip, self._devices = flops.chip_in_use(program.compute.dtype), program.mesh.size
    self._device = program.mesh.local_devices[0]
    self._start, self._steps = time.monotonic(), 0

  def step(self) -> None:
    """One more step has finished."""
    self._steps += 1

  @contextlib.contextmanager
  def pause(self):
    """The time inside does not count."""
    began = time.monotonic()
    yield
    self._start += time.monotonic() - began

  def rates(self) -> dict[str, float]:
    """tokens_per_second, step_time_s, mfu and memory_gib since the last call."""
    step_time = (time.monotonic() - self._start) / max(self._steps, 1)
    tokens_per_second = self._tokens_per_step / max(step_time, 1e-9)
    self._start, self._steps = time.monotonic(), 0
    rates = {
      "tokens_per_second": tokens_per_second,
      "step_time_s": step_time,
      "memory_gib": _peak_memory(self._device) / 2**30,
    }
    if self._chip is not None:  # of an unknown chip the peak is unknown too
      rates["mfu"] = flops.mfu(tokens_per_second, self._flops_per_token, self._devices, self._chip)
    return rates


def _peak_memory(device: jax.Device) -> float:
  """Peak bytes on the device; on a CPU the process's peak resident size."""
  if device.platform == "cpu":
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
  return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)

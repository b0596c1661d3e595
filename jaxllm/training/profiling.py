"""A trace of a few steps, for TensorBoard's profile tab or https://ui.perfetto.dev."""

import os
from pathlib import Path
from typing import Any

import jax

from jaxllm.training.config import ProfileConfig


class Profiler:
  """Traces `config.steps` steps into `<run>/profile`, from the `config.start`-th of this process on.

  with Profiler(config, run_directory) as profiler:
    for ...:
      profiler.before_step()
      state = step(state)
      profiler.after_step(state)
  """

  def __init__(self, config: ProfileConfig, run_directory: str | os.PathLike):
    self.config = config
    self.directory = Path(run_directory) / "profile"
    self._steps = 0  # finished
    self._tracing = False

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *error) -> None:
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()

  def before_step(self) -> None:
    if self.config.steps and self._steps == self.config.start:
      jax.profiler.start_trace(str(self.directory))
      self._tracing = True

  def after_step(self, result: Any) -> None:
    """`result` is anything the step computes: the trace ends only when the devices are done with it."""
    self._steps += 1
    if self._tracing and self._steps == self.config.start + self.config.steps:
      jax.block_until_ready(result)
      self._tracing = False
      jax.profiler.stop_trace()

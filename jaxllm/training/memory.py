"""What a run needs of a device's memory, and what to do where there is too little."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jaxllm.base.errors import UserError
from jaxllm.parallel.sharding import ways
from jaxllm.storage.reading import committed_steps
from jaxllm.training.compile import Program
from jaxllm.training.config import RunConfig

logger = logging.getLogger("jaxllm")


class OutOfMemory(UserError):
  """A device has too little memory for the run."""

  max_length = 4000  # of which the most is ways out


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Bytes on one device."""

  trained: int  # float32 weights
  optimizer: int  # moments, and the average of the weights
  frozen: int
  batch: int
  temporaries: int | None  # activations and gradients, as compiled; None: it does not compile, or does not say

  @property
  def total(self) -> int:
    return self.trained + self.optimizer + self.frozen + self.batch + (self.temporaries or 0)

  def __str__(self) -> str:
    parts = {
      "trained weights": self.trained,
      "optimizer": self.optimizer,
      "frozen weights": self.frozen,
      "batch": self.batch,
      "activations and gradients": self.temporaries,
    }
    known = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    more = " and the activations" if self.temporaries is None else ""
    return f"{size(self.total)}{more} per device ({known})"


def estimate(program: Program, compiled: Any = None) -> Estimate:
  """What the step needs: what it is given, and what the compiler has laid out beside it."""
  analysis = None if compiled is None else compiled.memory_analysis()
  state = program.state
  return Estimate(
    trained=on_a_device(state.params),
    optimizer=on_a_device((state.opt_state, state.ema)),
    frozen=on_a_device(program.frozen),
    batch=on_a_device(program.batch),
    temporaries=None if analysis is None else int(analysis.temp_size_in_bytes),
  )


def on_a_device(tree: Any) -> int:
  """Bytes of ShapeDtypeStructs on one of the devices that share them."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def ways_out(program: Program, run: RunConfig, need: Estimate) -> list[tuple[str, int | None]]:
  """Flags that make a run smaller, the cheapest first, and the bytes per device that each saves; None: not known.

  The first cost time alone, the next ones change what is trained, the last ones the data. The figures are rough:
  activations are taken to be all temporaries but the gradients, in equal parts for each row, position and layer.
  """
  training, model, compute = run.training, program.model, program.compute
  gradients = need.trained
  activations = None if need.temporaries is None else max(0, need.temporaries - gradients)

  def share(part: float, but: float = 0) -> int | None:
    return None if activations is None else max(0, int(part * activations - but))

  found: list[tuple[str, int | None]] = []
  batch_ways = ways("batch", program.mesh, run.mesh.rules)
  parts = 2 * training.accumulation
  if not training.batch_size % (parts * batch_ways):
    buffer = gradients if training.accumulation == 1 else 0  # in which micro-batches add up theirs
    found.append((f"training.accumulation={parts}", share(1 / 2, buffer)))
  if compute.remat != "full" and model.num_layers > 1:
    positions = program.tokens_per_step // training.accumulation // batch_ways
    kept = positions * model.embed_dim * model.num_layers * jax.numpy.dtype(compute.dtype).itemsize
    found.append(("compute.remat=full", share(1 - 1 / model.num_layers, kept)))
  if run.peft.adapters_only and run.model_init.quantize is None:
    wide = sum(on_a_device(leaf) * (1 - 4.5 / 8 / leaf.dtype.itemsize) for leaf in _matrices(program.frozen["policy"]))
    found.append(("model_init.quantize=nf4", int(wide)))
  if not run.peft.adapters_only:
    stored = sum(on_a_device(leaf) // leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state.params))
    itemsize = jax.numpy.dtype(compute.dtype).itemsize if run.model_init.path else 4
    found.append(("peft.kind=lora", need.optimizer + gradients + need.trained - stored * itemsize))
  if training.seq_len > 1:
    found.append((f"training.seq_len={training.seq_len // 2}", share(1 / 2)))
  return [way for way in found if way[1] != 0]


def _matrices(tree: Any) -> list[Any]:
  """The frozen matrices of the layers."""
  found = jax.tree_util.tree_leaves_with_path(tree)
  return [leaf for path, leaf in found if "blocks" in jax.tree_util.keystr(path) and leaf.ndim > 2]


@dataclasses.dataclass
class Memory:
  """A run's program, and the compiled step as soon as there is one."""

  program: Program
  run: RunConfig
  compiled: Any = None

  def warn_if_short(self) -> None:
    """A warning where the device says that it has less memory than the step needs."""
    has, need = (self.program.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit"), self.need
    if has is not None and need.total > has and jax.process_index() == 0:
      logger.warning("the step needs %s, and a device has %s; %s", need, size(has), self.advice())

  @property
  def need(self) -> Estimate:
    return estimate(self.program, self.compiled)

  def advice(self) -> str:
    """The three cheapest ways out, in words."""
    ways = [
      f"--config.{flag}" + (f" (about {size(saved)} less)" if saved else "")
      for flag, saved in ways_out(self.program, self.run, self.need)[:3]
    ]
    return f"what helps, the cheapest first: {', '.join(ways)}" if ways else "more devices help (mesh.fsdp)"


@contextlib.contextmanager
def explain_out_of_memory(program: Program, run: RunConfig, directory: Path) -> Iterator[Memory]:
  """Answers the runtime's error about memory with one that says what takes it, and what would take less.

  Args:
    directory: the run's.

  Raises:
    OutOfMemory: in place of a JaxRuntimeError that says so.
  """
  memory = Memory(program, run)
  try:
    yield memory
  except jax.errors.JaxRuntimeError as error:
    if not is_out_of_memory(error):
      raise
    saved = committed_steps(directory / "checkpoints")
    kept = f"step {saved[-1]} is saved in {directory}, from where the run goes on" if saved else "nothing is saved yet"
    raise OutOfMemory(
      f"out of memory: the run needs {memory.need}; {memory.advice()}; {kept} ({str(error).splitlines()[0][:160]})"
    ) from error


def is_out_of_memory(error: BaseException) -> bool:
  """Whether the runtime, or the compiler, has run out of memory."""
  return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def size(count: float) -> str:
  """Bytes as a person reads them."""
  return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

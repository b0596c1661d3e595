"""What a run is about to do, as rows of one table: the facts that one wants to know before step 0."""

import math

import jax

from jaxllm.base.chips import CHIPS
from jaxllm.data.manifest import Prepared
from jaxllm.data.show import example_rows
from jaxllm.kernels import backends, cpu_ffi
from jaxllm.kernels.backends import TARGETS
from jaxllm.models.weights import is_adapted, map_weights_with_path, num_parameters
from jaxllm.parallel.mesh import target_of
from jaxllm.training import flops
from jaxllm.training.compile import Program
from jaxllm.training.config import RunConfig


def startup_table(
  program: Program, compiled: jax.stages.Compiled, run: RunConfig, prepared: Prepared, compile_seconds: float
) -> list[tuple[str, str]]:
  """(name, value) rows: parameters, mesh, memory per device, FLOPs, kernels, data."""
  training, compute = run.training, program.compute
  total = num_parameters(program.params)
  trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.state.params))
  active = ""
  if program.model.moe is not None:
    active = f"; a token is multiplied by {flops.matmul_parameters(program.model):,}"
  axes = " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1)
  state_bytes = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves((program.state, program.frozen))
  )
  memory = compiled.memory_analysis()
  per_token = flops.row_flops(program.model, *program.row_lengths, train_weights=program.trains_weights)
  chip = CHIPS[target_of(program.mesh)]
  tokens_per_step = program.tokens_per_step
  train_tokens = prepared.total("train", "tokens")
  rows = [
    ("parameters", f"{total:,}, {trained:,} trained ({trained / total:.1%}){active}"),
    *_adapter_rows(program, run),
    ("objective", f"{run.objective.name} of {run.data.task}"),
    ("mesh", f"{program.mesh.size} x {compute.target}" + (f": {axes}" if axes else "")),
    ("state per device", _size(state_bytes)),
  ]
  if memory is not None:
    rows.append(("step per device", f"{_size(memory.temp_size_in_bytes)} of temporaries"))
  rows += example_rows(run.data, prepared, training.seq_len)
  return rows + [
    ("compute", f"{compute.dtype}, remat {compute.remat}, compiled in {compile_seconds:.1f} s"),
    ("FLOPs per token", f"{per_token.total:.3g} = {per_token.formula}"),
    ("peak", f"{chip.flops / 1e12:.3g} TFLOP/s per device ({chip.name})" if chip.flops else "unknown: no MFU"),
    ("kernels", kernels_in_use(compute.target)),
    ("tokens per step", f"{tokens_per_step:,}, in {training.accumulation} micro-batch(es)"),
    (
      "data",
      f"{train_tokens:,} tokens in {run.data.dir}; {training.steps:,} steps are "
      f"{training.steps * tokens_per_step / max(train_tokens, 1):.3g} epochs",
    ),
  ]


def _adapter_rows(program: Program, run: RunConfig) -> list[tuple[str, str]]:
  """Which modules have adapters, and which are trained whole beside them, by how many matrices there are of each."""
  if not run.peft.adapters_only:
    return []
  adapted, whole = [], []

  def one(path, w, part):
    if is_adapted(w):
      adapted.append(f"{_short(path)} x {math.prod(w.shape[:-2])}")
    elif jax.tree.leaves(part):
      whole.append(_short(path))

  map_weights_with_path(one, program.params, program.state.params)
  rows = [("adapters", f"{run.peft.kind} on {', '.join(adapted) or 'nothing'}")]
  return rows + ([("trained whole", ", ".join(whole))] if whole else [])


def _short(path: str) -> str:
  return path.removesuffix("/weight").removeprefix("blocks/")


def kernels_in_use(target: str) -> str:
  """The backends that the step was traced with, and in brackets what was passed over for them and why."""
  ops = {
    "attention": "attention",
    "packed_attention": "attention within segments",
    "matmul": "matmul",
    "elementwise": "norms and gates",
    "cross_entropy": "cross-entropy",
    "grouped_matmul": "experts",
  }
  used = {
    name: [f"{backend} ({why})" if why else backend for backend, why in backends.chosen(op, target).items()]
    for op, name in ops.items()
  }
  said = ", ".join(f"{name}: {' and '.join(taken)}" for name, taken in used.items() if taken)
  why = cpu_ffi.missing() if TARGETS.get(target) == "cpu" else None
  return f"{said}; no C++ kernels: {why}" if why else said


def _size(count: float) -> str:
  return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"

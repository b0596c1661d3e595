"""The train step as a compiled program: what is sharded how, and what it costs before it runs."""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig
from jaxllm.models.build import declare, init_params
from jaxllm.models.config import Compute, ComputeConfig, ModelConfig
from jaxllm.objectives.base import Objective
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import target_of
from jaxllm.parallel.sharding import (
  activation_sharding,
  batch_sharding,
  param_shardings,
  replicated,
)
from jaxllm.training.config import OptimizerConfig, TrainingConfig
from jaxllm.training.optimizer import make_optimizer, state_shardings
from jaxllm.training.schedules import make_schedule
from jaxllm.training.state import TrainState, init_state
from jaxllm.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """Everything static about a run's computation; nothing in it holds memory on a device."""

  model: ModelConfig
  compute: Compute
  mesh: Mesh
  graph: nnx.GraphDef
  axes: Any  # logical axes of every parameter
  state: TrainState  # ShapeDtypeStructs with shardings
  batch: dict[str, jax.ShapeDtypeStruct]
  init: Any  # jitted: key -> TrainState
  step: Any  # jitted: (state, batch) -> (state, metrics)
  evaluate: Any  # jitted: (params, batch) -> the objective's metrics as (sum, weight), "nll" in nats among them

  @property
  def row_lengths(self) -> tuple[int, ...]:
    """Positions of a row; of an encoder-decoder the decoder's, then the encoder's."""
    return tuple(self.batch[name].shape[1] for name in ("inputs", "encoder_inputs") if name in self.batch)

  @property
  def tokens_per_step(self) -> int:
    """Positions that a step reads, padding included; of an encoder-decoder on both sides."""
    return self.batch["inputs"].shape[0] * sum(self.row_lengths)


def make_program(
  model: ModelConfig,
  training: TrainingConfig,
  optimizer_config: OptimizerConfig,
  mesh_config: MeshConfig,
  mesh: Mesh,
  objective: Objective = CausalLM(),
  data: DataConfig = DataConfig(),
  compute_config: ComputeConfig = ComputeConfig(),
) -> Program:
  """Builds the jitted functions of a run; nothing is compiled or allocated yet.

  Raises:
    ConfigError: the model or the batch does not divide over the mesh, or what `compute_config` asks for cannot be had.
  """
  compute = compute_config.on(target_of(mesh), mesh.size)
  rules = mesh_config.rules
  graph, shapes, axes = declare(model, compute)
  shardings = param_shardings(shapes, axes, mesh, rules)
  optimizer = make_optimizer(optimizer_config, training.steps, shapes, shardings)
  schedule = make_schedule(optimizer_config, training.steps)

  def loss_fn(params, batch, key):
    return objective({"policy": nnx.merge(graph, params)}, batch, key)

  step = make_train_step(loss_fn, optimizer, schedule, training, compute, optimizer_config)

  def train_step(state, batch):  # the name that dumps and profiles show
    with activation_sharding(mesh, rules):
      return step(state, batch)

  def init(key):
    return init_state(init_params(model, key), optimizer, training, compute, optimizer_config)

  def evaluate(params, batch):
    with activation_sharding(mesh, rules):
      return objective({"policy": nnx.merge(graph, params)}, batch).metrics

  batch_ways = math.prod(mesh.shape[axis] for axis in rules.batch)
  if training.batch_size // training.accumulation % batch_ways:
    raise ConfigError(
      f"training.batch_size {training.batch_size} in {training.accumulation} micro-batches does not divide over "
      f"{' x '.join('mesh.' + axis for axis in rules.batch)} = {batch_ways} devices; change one of them"
    )
  row = objective.row(data, training.seq_len)
  if training.seq_len % (seq_ways := math.prod(mesh.shape[axis] for axis in rules.seq)):
    raise ConfigError(f"training.seq_len {training.seq_len} does not divide over mesh.context")
  if len(row["positions"]) % seq_ways:
    raise ConfigError(f"rows of {len(row['positions'])} targets (data.target_len) do not divide over mesh.context")
  abstract = jax.eval_shape(init, jax.random.key(0))
  specs = state_shardings(abstract, shapes, shardings)
  state = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract, specs)
  batch_shardings = {name: batch_sharding(mesh, rules, 1 + entry.ndim) for name, entry in row.items()}
  batch = {
    name: jax.ShapeDtypeStruct((training.batch_size, *entry.shape), entry.dtype, sharding=batch_shardings[name])
    for name, entry in row.items()
  }
  whole = replicated(mesh)
  return Program(
    model=model,
    compute=compute,
    mesh=mesh,
    graph=graph,
    axes=axes,
    state=state,
    batch=batch,
    init=jax.jit(init, out_shardings=specs),
    step=jax.jit(
      train_step,
      in_shardings=(specs, batch_shardings),
      out_shardings=(specs, whole),
      donate_argnums=0,
    ),
    evaluate=jax.jit(evaluate, in_shardings=(shardings, batch_shardings), out_shardings=whole),
  )

"""The train step as a compiled program: what is sharded how, and what it costs before it runs."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from jaxllm.base.errors import ConfigError
from jaxllm.data.config import DataConfig
from jaxllm.models.build import Params, declare, described, init_params
from jaxllm.models.config import Compute, ComputeConfig, ModelConfig
from jaxllm.models.noise import with_noise
from jaxllm.models.weights import (
  combine,
  is_adapted,
  map_weights_with_path,
  num_parameters,
  partition,
  with_keys,
  without_adapters,
)
from jaxllm.objectives.base import Objective
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.parallel.config import AxisRules, MeshConfig
from jaxllm.parallel.mesh import target_of
from jaxllm.parallel.sharding import (
  activation_sharding,
  batch_sharding,
  replicated,
  ways,
)
from jaxllm.peft.base import Full, Peft
from jaxllm.training.config import OptimizerConfig, TrainingConfig
from jaxllm.training.optimizer import make_optimizer, state_shardings
from jaxllm.training.param_rules import plan_params
from jaxllm.training.schedules import make_schedule
from jaxllm.training.start import ADAPTER, POLICY, Loaded, Start
from jaxllm.training.state import TrainState, init_state
from jaxllm.training.step import make_train_step

Frozen = dict[str, Any]  # model name -> its arrays that no step changes


@dataclasses.dataclass(frozen=True)
class Program:
  """Everything static about a run's computation; nothing in it holds memory on a device.

  `frozen` has what no step changes: under "policy" the arrays of the model that are not trained, and each other model
  of the objective whole. `loaded` has what a run begins with: parameters by path, of the policy those that are not to
  be fresh, and of the other models that have files.
  """

  model: ModelConfig
  compute: Compute
  mesh: Mesh
  graph: nnx.GraphDef
  params: Params  # of the policy, all of them: ShapeDtypeStructs with shardings
  state: TrainState  # ShapeDtypeStructs with shardings
  frozen: Frozen  # the same
  loaded: Loaded  # the same: what `init` wants
  batch: Any
  init: Any  # jitted: (key, loaded) -> (state, frozen)
  init_frozen: Any  # jitted: (key, loaded) -> frozen, for a run that has its state already
  begin: Any  # jitted: (key, loaded) -> the policy's parameters before adapters
  step: Any  # jitted: (state, frozen, batch) -> (state, metrics)
  evaluate: Any  # jitted: (trained, frozen, batch) -> the objective's metrics as (sum, weight)

  @property
  def inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays [B, T] of token ids that a step reads."""
    found = jax.tree_util.tree_leaves_with_path(self.batch)
    named = [(jax.tree_util.keystr(path[-1:], simple=True), leaf) for path, leaf in found]
    return tuple(leaf for wanted in ("inputs", "encoder_inputs") for name, leaf in named if name == wanted)

  @property
  def row_lengths(self) -> tuple[int, ...]:
    """Positions of a row; of an encoder-decoder the decoder's, then the encoder's."""
    own = self.batch.get("chosen", self.batch)
    return tuple(own[name].shape[1] for name in ("inputs", "encoder_inputs") if name in own)

  @property
  def tokens_per_step(self) -> int:
    """Positions that a step reads, padding included; of an encoder-decoder on both sides, of pairs in both rows."""
    return sum(math.prod(leaf.shape) for leaf in self.inputs)

  @property
  def trains_weights(self) -> bool:
    """Whether most of the model is trained, and not adapters beside it."""
    trained = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state.params))
    return 2 * trained > num_parameters(self.params)

  @property
  def arguments(self) -> tuple[TrainState, Frozen, Any]:
    """What `step` takes, as shapes."""
    return self.state, self.frozen, self.batch

  def policy(self, trained: Any, frozen: Frozen) -> Params:
    """All parameters of the model that is trained."""
    return combine(trained, frozen[POLICY])


def make_program(
  model: ModelConfig,
  training: TrainingConfig,
  optimizer_config: OptimizerConfig,
  mesh_config: MeshConfig,
  mesh: Mesh,
  objective: Objective = CausalLM(),
  data: DataConfig = DataConfig(),
  compute_config: ComputeConfig = ComputeConfig(),
  peft: Peft = Full(),
  start: Start = Start(),
) -> Program:
  """Builds the jitted functions of a run; nothing is compiled or allocated yet.

  Raises:
    ConfigError: the model or the batch does not divide over the mesh, or what `compute_config` asks for cannot be had.
  """
  compute = compute_config.on(target_of(mesh), mesh.size)
  rules = mesh_config.rules
  graph, stored_shapes, axes = declare(model, compute)
  stored_shapes = start.with_stored_dtypes(stored_shapes)

  def quantize(params):
    return start.quantize(params, peft.saves)

  def adapt(params, key, kept):
    if start.adapter is not None:
      return start.with_adapter(params, kept)
    return peft.adapt(params, key, kept, leave=start.is_fresh)

  began_shapes = jax.eval_shape(quantize, stored_shapes)
  if start.adapter is None:
    peft.check(began_shapes)
  shapes = jax.eval_shape(adapt, began_shapes, jax.random.key(0), start.adapter_shapes)
  params = described(shapes, axes, mesh, rules)
  plans = plan_params(optimizer_config, shapes, peft.trained(shapes, start.is_fresh), peft.lr_scale)
  _check_adapters(shapes, [plan.path for plan in plans if plan.algorithm == "frozen"])
  is_trained = jax.tree.unflatten(jax.tree.structure(shapes), [plan.algorithm != "frozen" for plan in plans])
  trained_shapes = partition(shapes, is_trained)[0]
  shardings = partition(jax.tree.map(lambda leaf: leaf.sharding, params), is_trained)[0]
  optimizer = make_optimizer(
    optimizer_config, training.steps, trained_shapes, shardings, [p for p in plans if p.algorithm != "frozen"]
  )
  schedule = make_schedule(optimizer_config, training.steps)
  noise = training.neftune_alpha / (model.embedding_scale or 1)

  # The objective's other models: from files, or the policy as it began.
  others = {name: declare(config, compute) for name, config in start.others.items()}
  as_begun = set(objective.others) - set(others)
  changed = without_adapters(is_trained)  # of what it has, the rest is there still, under the adapters
  copied = as_begun if any(jax.tree.leaves(changed)) else set()

  def begin(key, loaded):
    return quantize(start.filled(init_params(model, key), loaded.get(POLICY, {})))

  def init(key, loaded):
    began = begin(key, loaded)
    trained, frozen = partition(adapt(began, key, loaded.get(ADAPTER, {})), is_trained)
    trained = jax.tree.map(lambda w: w.astype(jnp.float32), trained)
    models = {POLICY: frozen} | {name: jax.tree.map(jnp.copy, partition(began, changed)[0]) for name in copied}
    models |= {name: traverse_util.unflatten_dict(loaded[name], sep="/") for name in others}
    return init_state(trained, optimizer, training, compute, optimizer_config), models

  def models(trained, frozen, key=None):
    params = combine(trained, frozen[POLICY])
    under = without_adapters(jax.lax.stop_gradient(params))
    if key is not None:
      params = with_keys(params, key)
      params = with_noise(params, noise, key) if noise else params
    found = {POLICY: nnx.merge(graph, params)}
    for name in as_begun:
      found[name] = nnx.merge(graph, combine(frozen[name], under) if name in copied else under)
    return found | {name: nnx.merge(other[0], frozen[name]) for name, other in others.items()}

  def train_step(state, frozen, batch):  # the name that dumps and profiles show
    def loss_fn(trained, batch, key):
      return objective(models(trained, frozen, key), batch, key)

    step = make_train_step(loss_fn, optimizer, schedule, training, compute, optimizer_config)
    with activation_sharding(mesh, rules):
      return step(state, batch)

  def evaluate(trained, frozen, batch):
    with activation_sharding(mesh, rules):
      return objective(models(trained, frozen), batch).metrics

  # Rows of the batch
  row = objective.row(data, training.seq_len)
  _check_batch(row, training, mesh, rules)
  batch = jax.tree.map(
    lambda entry: jax.ShapeDtypeStruct(
      (training.batch_size, *entry.shape), entry.dtype, sharding=batch_sharding(mesh, rules, 1 + entry.ndim)
    ),
    row,
  )

  # What lies where
  began = described(began_shapes, axes, mesh, rules)
  teachers = {name: described(start.teacher_shapes(name), other[2], mesh, rules) for name, other in others.items()}
  is_frozen = not all(jax.tree.leaves(is_trained)) or bool(copied)
  loaded = start.from_files(began, teachers, keep_fresh=is_frozen, adapted=params, keeps=peft.keeps)
  abstract, _ = jax.eval_shape(init, jax.random.key(0), loaded)
  specs = state_shardings(abstract, trained_shapes, shardings)
  state = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), abstract, specs)
  frozen = {POLICY: partition(params, is_trained)[1]}
  frozen |= {name: partition(began, changed)[0] for name in copied} | teachers
  sharding_of = functools.partial(jax.tree.map, lambda leaf: leaf.sharding)
  whole = replicated(mesh)
  return Program(
    model=model,
    compute=compute,
    mesh=mesh,
    graph=graph,
    params=params,
    state=state,
    frozen=frozen,
    loaded=loaded,
    batch=batch,
    init=jax.jit(init, out_shardings=(specs, sharding_of(frozen))),
    begin=jax.jit(begin, out_shardings=sharding_of(began)),
    init_frozen=jax.jit(lambda key, loaded: init(key, loaded)[1], out_shardings=sharding_of(frozen)),
    step=jax.jit(
      train_step,
      in_shardings=(specs, sharding_of(frozen), sharding_of(batch)),
      out_shardings=(specs, whole),
      donate_argnums=0,
    ),
    evaluate=jax.jit(evaluate, in_shardings=(shardings, sharding_of(frozen), sharding_of(batch)), out_shardings=whole),
  )


def _check_adapters(shapes: Params, frozen: list[str]) -> None:
  """That all that adapters add is trained: what is frozen stands in the files that the run began with, or nowhere."""

  def one(path, w):
    names = [name for name in ("a", "b", "magnitude") if f"{path}/{name}" in frozen]
    if is_adapted(w) and names:
      raise ConfigError(
        f"optimizer.rules freeze {path}/{names[0]}, a part of an adapter, which no file would have; name modules that "
        "are to have none in peft.exclude"
      )

  map_weights_with_path(one, shapes)


def _check_batch(row: Any, training: TrainingConfig, mesh: Mesh, rules: AxisRules) -> None:
  batch_ways, seq_ways = ways("batch", mesh, rules), ways("seq", mesh, rules)
  if training.batch_size // training.accumulation % batch_ways:
    raise ConfigError(
      f"training.batch_size {training.batch_size} in {training.accumulation} micro-batches does not divide over "
      f"{' x '.join('mesh.' + axis for axis in rules.batch)} = {batch_ways} devices; change one of them"
    )
  if training.seq_len % seq_ways:
    raise ConfigError(f"training.seq_len {training.seq_len} does not divide over mesh.context")
  for length in {leaf.shape[0] for leaf in jax.tree.leaves(row) if leaf.ndim}:
    if length % seq_ways:
      raise ConfigError(f"rows of {length} targets (data.target_len) do not divide over mesh.context")

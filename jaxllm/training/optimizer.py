"""Optimizers: optax's transformations, dealt out to the parameters by their plans."""

import dataclasses
from collections.abc import Sequence

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxllm.training.adafactor import scale_by_adafactor, statistic_spec
from jaxllm.training.config import OptimizerConfig
from jaxllm.training.muon import scale_by_muon
from jaxllm.training.param_rules import ParamPlan, plan_params
from jaxllm.training.schedules import Schedule, make_schedule


def make_optimizer(
  config: OptimizerConfig,
  total_steps: int,
  params_shapes: PyTree,
  shardings: PyTree[NamedSharding] | None = None,
  plans: Sequence[ParamPlan] | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer for trained parameters of these shapes (arrays or `jax.eval_shape`'s output).

  `update(grads, state, params, step=step)` returns updates to add to `params`. The learning rate is the
  schedule's at `step`, which goes on through skipped steps, while moments and their bias correction count
  the updates that were made. With `shardings`, a tree like the parameters, Muon moves the matrices between
  devices itself; without them XLA gathers every matrix that is split. `plans` are those of the parameters, by default
  what `plan_params` makes of them.

  Raises:
    ConfigError: see `plan_params`.
  """
  plans = plan_params(config, params_shapes) if plans is None else plans
  schedule = make_schedule(config, total_steps)
  # Muon's matrices follow the same curve up to their own peak.
  muon_schedule = make_schedule(dataclasses.replace(config, learning_rate=config.muon_learning_rate), total_steps)
  labels = jax.tree.unflatten(jax.tree.structure(params_shapes), [_label(plan) for plan in plans])
  transforms = {}
  for plan in plans:
    if _label(plan) not in transforms:
      rate = muon_schedule if plan.algorithm == "muon" else schedule
      transforms[_label(plan)] = _transform(config, plan, rate, shardings)
  return optax.partition(transforms, labels)


def _label(plan: ParamPlan) -> str:
  """Parameters with the same label share a transformation."""
  return f"{plan.algorithm}, stacked along {plan.stack_axes} axes, lr x {plan.lr_scale:g}, decay {plan.weight_decay:g}"


def _transform(
  config: OptimizerConfig, plan: ParamPlan, schedule: Schedule, shardings: PyTree[NamedSharding] | None
) -> optax.GradientTransformation:
  if plan.algorithm == "adamw":  # Loshchilov and Hutter, arXiv 1711.05101
    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
  elif plan.algorithm == "lion":  # Chen et al., arXiv 2302.06675
    direction = optax.scale_by_lion(config.b1, config.b2)
  elif plan.algorithm == "sgd":
    direction = optax.trace(config.b1)
  else:
    # Chains of one, so that the leaves of the state keep the paths that they have in checkpoints.
    if plan.algorithm == "adafactor":
      direction = optax.chain(scale_by_adafactor(plan.stack_axes))
    else:
      direction = optax.chain(scale_by_muon(config.muon_momentum, shardings))
  return optax.chain(
    direction, optax.add_decayed_weights(plan.weight_decay), _scale_by_schedule(schedule, plan.lr_scale)
  )


def _scale_by_schedule(schedule: Schedule, lr_scale: float) -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the learning rate at `step`, an extra argument of the update."""

  def update(updates, state, params=None, *, step, **extra):
    rate = -lr_scale * schedule(step)
    return jax.tree.map(lambda u: rate * u, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def state_shardings(abstract_state: PyTree, params_shapes: PyTree, param_shardings: PyTree) -> PyTree:
  """Shardings for any state built around the parameters: an optax state, or a whole TrainState.

  A leaf whose path ends with a parameter's path is sharded like it if it has its shape (moments, averaged
  and master weights), and like the axes that it shares with it if it lacks one (Adafactor's row and column
  statistics), so that the update gathers nothing. Everything else is replicated.

  Args:
    abstract_state: `jax.eval_shape` of what makes the state.
    params_shapes: the parameters (arrays or ShapeDtypeStructs).
    param_shardings: a NamedSharding per parameter, the same tree.

  Returns:
    A tree like `abstract_state` of NamedShardings.
  """
  shardings = jax.tree.leaves(param_shardings)
  by_path = {
    path: (leaf.shape, sharding)
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params_shapes), shardings, strict=True)
  }
  replicated = NamedSharding(shardings[0].mesh, PartitionSpec())

  def sharding_of(path, leaf):
    for start in range(len(path)):
      shape, sharding = by_path.get(path[start:], (None, None))
      if shape == leaf.shape:
        return sharding
      if start and shape is not None:
        name = jax.tree_util.keystr(path[start - 1 : start], simple=True)
        return NamedSharding(sharding.mesh, statistic_spec(name, leaf.shape, shape, sharding.spec))
    return replicated

  return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)

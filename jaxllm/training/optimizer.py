"""Optimizers: optax's transformations, dealt out to the parameters by their plans."""

import dataclasses
import math

import jax
import optax
from jaxtyping import PyTree

from jaxllm.training.config import OptimizerConfig
from jaxllm.training.param_rules import ParamPlan, plan_params
from jaxllm.training.schedules import Schedule, make_schedule


def make_optimizer(
  config: OptimizerConfig, total_steps: int, params_shapes: PyTree
) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer for parameters of these shapes (arrays or `jax.eval_shape`'s output).

  `update(grads, state, params, step=step)` returns updates to add to `params`. The learning rate is the
  schedule's at `step`, which goes on through skipped steps, while moments and their bias correction count
  the updates that were made.

  Raises:
    ConfigError: see `plan_params`.
  """
  plans = plan_params(config, params_shapes)
  schedule = make_schedule(config, total_steps)
  # Muon's matrices follow the same curve up to their own peak.
  muon_schedule = make_schedule(dataclasses.replace(config, learning_rate=config.muon_learning_rate), total_steps)
  labels = jax.tree.unflatten(jax.tree.structure(params_shapes), [_label(plan) for plan in plans])
  transforms = {}
  for plan in plans:
    if _label(plan) not in transforms:
      rate = muon_schedule if plan.algorithm == "muon" else schedule
      transforms[_label(plan)] = _transform(config, plan, rate)
  return optax.partition(transforms, labels)


def _label(plan: ParamPlan) -> str:
  """Parameters with the same label share a transformation."""
  if plan.algorithm == "frozen":
    return "frozen"
  return f"{plan.algorithm}, stacked along {plan.stack_axes} axes, lr x {plan.lr_scale:g}, decay {plan.weight_decay:g}"


def _transform(config: OptimizerConfig, plan: ParamPlan, schedule: Schedule) -> optax.GradientTransformation:
  if plan.algorithm == "frozen":
    return optax.set_to_zero()
  if plan.algorithm == "adamw":  # Loshchilov and Hutter, arXiv 1711.05101
    direction = optax.scale_by_adam(config.b1, config.b2, config.eps)
  elif plan.algorithm == "lion":  # Chen et al., arXiv 2302.06675
    direction = optax.scale_by_lion(config.b1, config.b2)
  elif plan.algorithm == "sgd":
    direction = optax.trace(config.b1)
  elif plan.algorithm == "adafactor":  # Shazeer and Stern, arXiv 1804.04235: relative steps, no momentum
    direction = optax.chain(
      optax.scale_by_factored_rms(min_dim_size_to_factor=2),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
    )
    for _ in range(plan.stack_axes):
      direction = _per_slice(direction)
  else:  # Jordan 2024, https://kellerjordan.github.io/posts/muon/
    direction = optax.chain(
      optax.contrib.scale_by_muon(beta=config.muon_momentum, weight_dimension_numbers=_matrices),
      optax.stateless(_scale_by_shape),
    )
  return optax.chain(
    direction, optax.add_decayed_weights(plan.weight_decay), _scale_by_schedule(schedule, plan.lr_scale)
  )


def _matrices(updates: PyTree) -> PyTree:
  """For Muon: the last two axes of every parameter are a matrix [in, out], those before count matrices."""
  return jax.tree.map(lambda u: optax.contrib.MuonDimensionNumbers(u.ndim - 2, u.ndim - 1), updates)


def _scale_by_shape(updates: PyTree, params: PyTree) -> PyTree:
  """Keeps the update's size per output the same for every matrix [in, out]."""
  del params
  return jax.tree.map(lambda u: math.sqrt(max(1.0, u.shape[-1] / u.shape[-2])) * u, updates)


def _scale_by_schedule(schedule: Schedule, lr_scale: float) -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the learning rate at `step`, an extra argument of the update."""

  def update(updates, state, params=None, *, step, **extra):
    rate = -lr_scale * schedule(step)
    return jax.tree.map(lambda u: rate * u, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _per_slice(transform: optax.GradientTransformation) -> optax.GradientTransformation:
  """Treats every slice along the first axis (a layer of a stack) as a tensor of its own."""

  def update(updates, state, params=None):
    return jax.vmap(transform.update)(updates, state, params)

  return optax.GradientTransformation(jax.vmap(transform.init), update)


def state_shardings(abstract_state: PyTree, params_shapes: PyTree, param_shardings: PyTree) -> PyTree:
  """Shardings for any state built around the parameters: an optax state, or a whole TrainState.

  A leaf whose path ends with a parameter's path and whose shape is that parameter's (moments, averaged
  and master weights) is sharded like it, so that the update needs no communication. Everything else is
  replicated: scalars, and Adafactor's row and column statistics, which together are smaller than the
  parameter by a factor of its width.

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
  replicated = jax.sharding.NamedSharding(shardings[0].mesh, jax.sharding.PartitionSpec())

  def sharding_of(path, leaf):
    for start in range(len(path)):
      shape, sharding = by_path.get(path[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated

  return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)

"""Optimizers as optax transformations that know the layer axis of stacked parameters.

Each algorithm is one pure function of one parameter, `(gradient, slots, param, ...) -> (update, slots)`,
written as one elementwise expression where the algorithm allows, so that XLA makes one pass over memory;
a hand-written kernel replaces that function and nothing else. Slots are the float32 moments.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxllm.training.config import OptimizerConfig
from jaxllm.training.param_rules import ParamPlan, plan_params
from jaxllm.training.schedules import make_schedule

# Quintic Newton-Schulz coefficients of Jordan (2024), https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

Slots = dict[str, Float[Array, "..."]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OptimizerState:
  count: Int[Array, ""]  # updates made
  # Slot name ("mu", "nu", ...) -> a tree like the parameters, optax.MaskedNode() where one has no such slot.
  slots: dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Hyper:
  """What one update of one parameter depends on, besides the parameter."""

  config: OptimizerConfig
  plan: ParamPlan
  learning_rate: Float[Array, ""]  # of this step and this parameter
  count: Int[Array, ""]  # this update included: 1 for the first
  applied: Bool[Array, ""]  # False: the slots keep their old values, and the update means nothing
  # 1 / (1 - b1^count) and 1 / sqrt(1 - b2^count): Adam's bias corrections, computed once for all parameters.
  mu_correction: Float[Array, ""]
  nu_correction: Float[Array, ""]


class Algorithm(NamedTuple):
  init: Callable[[ParamPlan, Float[Array, "..."]], Slots]
  update: Callable[..., tuple[Float[Array, "..."], Slots]]  # (grad, slots, param, hyper) -> (update, slots)


def _commit(hyper: Hyper, new: Slots, old: Slots) -> Slots:
  """The slots after this step, to compute the update from.

  Computing the update from the *stored* values lets XLA write every slot in place: an update that read the
  old ones would have to run before they are overwritten, and XLA:CPU, which has no fusion with several
  outputs, then copies whole slots first.
  """
  return {name: jnp.where(hyper.applied, new[name], old[name]) for name in new}


def adamw_update(grad, slots, param, hyper):
  """AdamW (Loshchilov & Hutter, arXiv 1711.05101), with the decay multiplied by the learning rate."""
  config = hyper.config
  mu = config.b1 * slots["mu"] + (1 - config.b1) * grad
  nu = config.b2 * slots["nu"] + (1 - config.b2) * grad * grad
  slots = _commit(hyper, {"mu": mu, "nu": nu}, slots)
  direction = slots["mu"] * hyper.mu_correction / (jnp.sqrt(slots["nu"]) * hyper.nu_correction + config.eps)
  return -hyper.learning_rate * (direction + hyper.plan.weight_decay * param), slots


def lion_update(grad, slots, param, hyper):
  """Lion (Chen et al., arXiv 2302.06675, algorithm 2)."""
  config = hyper.config
  direction = jnp.sign(config.b1 * slots["mu"] + (1 - config.b1) * grad)
  slots = _commit(hyper, {"mu": config.b2 * slots["mu"] + (1 - config.b2) * grad}, slots)
  return -hyper.learning_rate * (direction + hyper.plan.weight_decay * param), slots


def sgd_update(grad, slots, param, hyper):
  """SGD with heavy-ball momentum b1 (mu = b1 mu + grad) and decoupled weight decay."""
  slots = _commit(hyper, {"mu": hyper.config.b1 * slots["mu"] + grad}, slots)
  return -hyper.learning_rate * (slots["mu"] + hyper.plan.weight_decay * param), slots


def adafactor_update(grad, slots, param, hyper):
  """Adafactor without momentum (Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5).

  The learning rate is relative: it is multiplied by the root mean square of the parameter (at least
  1e-3), so useful values are near 1e-2. Row and column statistics, update clipping (at 1) and that root
  mean square are taken per layer.
  """
  axes = tuple(range(hyper.plan.stack_axes, param.ndim))
  # 1 - t^-0.8 (section 7.2): the first update takes its own statistics whole.
  decay = 1 - hyper.count.astype(jnp.float32) ** -0.8
  square = grad * grad + 1e-30
  if hyper.plan.matrix:
    row = decay * slots["nu_row"] + (1 - decay) * square.mean(-1)
    col = decay * slots["nu_col"] + (1 - decay) * square.mean(-2)
    slots = _commit(hyper, {"nu_row": row, "nu_col": col}, slots)
    row, col = slots["nu_row"], slots["nu_col"]
    row = row / row.mean(-1, keepdims=True)
    direction = grad * jax.lax.rsqrt(row)[..., :, None] * jax.lax.rsqrt(col)[..., None, :]
  else:
    slots = _commit(hyper, {"nu": decay * slots["nu"] + (1 - decay) * square}, slots)
    direction = grad * jax.lax.rsqrt(slots["nu"])
  direction = direction / jnp.maximum(1, _rms(direction, axes))
  scale = jnp.maximum(1e-3, _rms(param, axes))
  return -hyper.learning_rate * (scale * direction + hyper.plan.weight_decay * param), slots


def _rms(x, axes):
  return jnp.sqrt(jnp.mean(x * x, axis=axes, keepdims=True))


def muon_update(grad, slots, param, hyper):
  """Muon (Jordan 2024): Nesterov momentum, orthogonalised per [in, out] matrix, in every layer on its own."""
  momentum = hyper.config.muon_momentum
  slots = _commit(hyper, {"mu": momentum * slots["mu"] + (1 - momentum) * grad}, slots)
  direction = orthogonalize(momentum * slots["mu"] + (1 - momentum) * grad)
  fan_in, fan_out = param.shape[-2:]
  direction = math.sqrt(max(1.0, fan_out / fan_in)) * direction
  return -hyper.learning_rate * (direction + hyper.plan.weight_decay * param), slots


def orthogonalize(x: Float[Array, "*stack rows cols"]) -> Float[Array, "*stack rows cols"]:
  """Moves the singular values of each matrix to about 1 (0.7 to 1.2) by five Newton-Schulz iterations.

  Leading axes are a batch of independent matrices. The iteration runs on the wide orientation, where the
  Gram matrix is the smaller one. Source: https://kellerjordan.github.io/posts/muon/
  """
  a, b, c = NEWTON_SCHULZ
  tall = x.shape[-2] > x.shape[-1]
  x = x.mT if tall else x
  x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-7)
  for _ in range(NEWTON_SCHULZ_STEPS):
    gram = x @ x.mT
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x.mT if tall else x


def _zeros(*names):
  return lambda plan, param: {name: jnp.zeros(param.shape, jnp.float32) for name in names}


def _adafactor_init(plan, param):
  if not plan.matrix:
    return {"nu": jnp.zeros(param.shape, jnp.float32)}
  *stack, rows, cols = param.shape
  return {"nu_row": jnp.zeros((*stack, rows), jnp.float32), "nu_col": jnp.zeros((*stack, cols), jnp.float32)}


ALGORITHMS = {
  "adamw": Algorithm(_zeros("mu", "nu"), adamw_update),
  "lion": Algorithm(_zeros("mu"), lion_update),
  "sgd": Algorithm(_zeros("mu"), sgd_update),
  "muon": Algorithm(_zeros("mu"), muon_update),
  "adafactor": Algorithm(_adafactor_init, adafactor_update),
  "frozen": Algorithm(_zeros(), lambda grad, slots, param, hyper: (jnp.zeros_like(param), {})),
}
SLOTS = ("mu", "nu", "nu_row", "nu_col")


def make_optimizer(
  config: OptimizerConfig, total_steps: int, params_shapes: PyTree
) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer for parameters of these shapes (arrays or `jax.eval_shape`'s output).

  `update(grads, state, params, step=None, applied=True)` returns float32 updates to add to `params`. `step`
  places the learning rate on its schedule; without it the number of updates made so far does. The two
  differ after a skipped step, when the schedule goes on while the moments and their bias correction stand
  still. Where the scalar `applied` is False the state comes back unchanged and the updates mean nothing.
  The gradients of frozen parameters are not looked at.

  Raises:
    ConfigError: see `plan_params`.
  """
  plans = plan_params(config, params_shapes)
  schedule = make_schedule(config, total_steps)
  # Muon's matrices follow the same curve up to their own peak.
  muon_config = dataclasses.replace(config, learning_rate=config.muon_learning_rate)
  muon_schedule = make_schedule(muon_config, total_steps)

  def init(params: PyTree) -> OptimizerState:
    leaves, treedef = jax.tree.flatten(params)
    slots = [ALGORITHMS[plan.algorithm].init(plan, leaf) for plan, leaf in zip(plans, leaves, strict=True)]
    return OptimizerState(jnp.int32(0), _slots_to_trees(slots, treedef))

  def update(
    grads: PyTree,
    state: OptimizerState,
    params: PyTree,
    *,
    step: Int[Array, ""] | None = None,
    applied: Bool[Array, ""] | bool = True,
  ) -> tuple[PyTree, OptimizerState]:
    leaves, treedef = jax.tree.flatten(params)
    step = state.count if step is None else step
    count, applied = state.count + 1, jnp.asarray(applied)
    rate, muon_rate = schedule(step), muon_schedule(step)
    mu_correction = 1 / (1 - config.b1**count)
    nu_correction = jax.lax.rsqrt(1 - config.b2**count)

    updates, new_slots = [], []
    grads, old_slots = treedef.flatten_up_to(grads), _trees_to_slots(state.slots, treedef)
    for plan, grad, slots, param in zip(plans, grads, old_slots, leaves, strict=True):
      base_rate = muon_rate if plan.algorithm == "muon" else rate
      hyper = Hyper(config, plan, base_rate * plan.lr_scale, count, applied, mu_correction, nu_correction)
      leaf_update, leaf_slots = ALGORITHMS[plan.algorithm].update(grad, slots, param, hyper)
      updates.append(leaf_update)
      new_slots.append(leaf_slots)
    count = jnp.where(applied, count, state.count)
    return jax.tree.unflatten(treedef, updates), OptimizerState(count, _slots_to_trees(new_slots, treedef))

  # Unlike optax's protocol, `params` are required.
  return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _slots_to_trees(slots: list[Slots], treedef) -> dict[str, PyTree]:
  return {
    name: jax.tree.unflatten(treedef, [leaf.get(name, optax.MaskedNode()) for leaf in slots])
    for name in SLOTS
    if any(name in leaf for leaf in slots)
  }


def _trees_to_slots(trees: dict[str, PyTree], treedef) -> list[Slots]:
  columns = {name: treedef.flatten_up_to(tree) for name, tree in trees.items()}
  return [
    {name: column[i] for name, column in columns.items() if not isinstance(column[i], optax.MaskedNode)}
    for i in range(treedef.num_leaves)
  ]


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
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params_shapes), shardings, strict=True
    )
  }
  replicated = jax.sharding.NamedSharding(shardings[0].mesh, jax.sharding.PartitionSpec())

  def sharding_of(path, leaf):
    for start in range(len(path)):
      shape, sharding = by_path.get(path[start:], (None, None))
      if shape == leaf.shape:
        return sharding
    return replicated

  return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)

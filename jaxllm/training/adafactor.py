"""Adafactor (Shazeer and Stern, arXiv 1804.04235) for stacked parameters: relative steps, no momentum."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec


def scale_by_adafactor(stack_axes: int) -> optax.GradientTransformation:
  """The direction of Adafactor; along `stack_axes` leading axes every slice is a tensor of its own.

  The second moment of a matrix [in, out] is kept as the means of its rows and of its columns. Parameters may
  differ in the lengths of their leading axes.
  """
  factored_rms = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
  step_size = optax.chain(optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())

  def init(params):
    states = jax.tree.map(_per_slice(factored_rms.init, stack_axes), params)
    states = jax.tree.transpose(jax.tree.structure(params), None, states)
    return states._replace(count=jnp.int32(0))

  def update(updates, state, params):
    def one(update, row, column, whole, param):
      update, new = factored_rms.update(update, optax.FactoredState(state.count, row, column, whole), param)
      update, _ = step_size.update(update, step_size.init(param), param)
      return update, new.v_row, new.v_col, new.v

    results = jax.tree.map(_per_slice(one, stack_axes), updates, state.v_row, state.v_col, state.v, params)
    updates, *statistics = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0,) * 4), results)
    return updates, optax.FactoredState(optax.safe_increment(state.count), *statistics)

  return optax.GradientTransformation(init, update)


def statistic_spec(
  name: str, shape: tuple[int, ...], param_shape: tuple[int, ...], param_spec: PartitionSpec
) -> PartitionSpec:
  """How a statistic of a parameter lies on the mesh: as those of the parameter's axes that it has kept.

  The means are then sums over devices of what each holds, and nothing is gathered.

  Args:
    name: the statistic's field in `optax.FactoredState`.
    shape: the statistic's shape.
    param_shape: the parameter's.
    param_spec: how the parameter lies.

  Returns:
    An empty spec if the statistic is not the parameter without one of its last two axes.
  """
  entries = (*param_spec, *[None] * (len(param_shape) - len(param_spec)))
  without = lambda axes, axis: (*axes[:axis], *axes[axis + 1 :])  # noqa: E731
  averaged = [axis for axis in (len(shape) - 1, len(shape)) if axis >= 0 and without(param_shape, axis) == shape]
  if not averaged:
    return PartitionSpec()
  # Of a square matrix both fit: optax averages over the last for v_row, over the one before for v_col.
  return PartitionSpec(*without(entries, averaged[-1 if name == "v_row" else 0]))


def _per_slice(function: Callable, stack_axes: int) -> Callable:
  """Applies `function` to every slice along the leading axes."""
  for _ in range(stack_axes):
    function = jax.vmap(function)
  return function

"""Logical axes to mesh axes: the only place that decides which device holds what."""

import contextlib
import contextvars
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxllm.base.errors import ConfigError
from jaxllm.parallel.config import AxisRules

LogicalAxes = tuple[str | None, ...]


def partition_spec(axes: LogicalAxes, rules: AxisRules, name: str = "array") -> PartitionSpec:
  """The PartitionSpec of an array whose dimensions have these logical names (None: replicated).

  Raises:
    ConfigError: a logical name that the rules do not know, or two dimensions on one mesh axis.
  """
  entries: list[str | tuple[str, ...] | None] = []
  used: dict[str, str] = {}
  for axis in axes:
    if axis is None:
      entries.append(None)
      continue
    if not hasattr(rules, axis):
      raise ConfigError(f"{name} has the logical axis {axis!r}, which mesh.rules does not name")
    mesh_axes = getattr(rules, axis)
    for mesh_axis in mesh_axes:
      if mesh_axis in used:
        raise ConfigError(
          f"mesh.rules puts both {used[mesh_axis]!r} and {axis!r} of {name} on the mesh axis {mesh_axis!r}"
        )
      used[mesh_axis] = axis
    entries.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else tuple(mesh_axes))
  return PartitionSpec(*entries)


def check_divisible(shape: tuple[int, ...], axes: LogicalAxes, mesh: Mesh, rules: AxisRules, name: str) -> None:
  """Raises ConfigError when a dimension does not divide evenly over its mesh axes."""
  for size, axis in zip(shape, axes, strict=True):
    if size % (count := ways(axis, mesh, rules)):
      raise ConfigError(
        f"{name}: its {axis} dimension of {size} does not divide over mesh.{'*'.join(getattr(rules, axis))} = "
        f"{count}; change the mesh or the model"
      )


def param_shardings(shapes: Any, axes: Any, mesh: Mesh, rules: AxisRules) -> Any:
  """A NamedSharding for every parameter, in a tree like `shapes`.

  Args:
    shapes: a tree of arrays or ShapeDtypeStructs.
    axes: the same tree of LogicalAxes tuples.
  """

  def one(path, leaf, names):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = partition_spec(names, rules, name)
    check_divisible(leaf.shape, names, mesh, rules, name)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, shapes, axes)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of a value that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: AxisRules, ndim: int = 2) -> NamedSharding:
  """The sharding of a batch's [B, T] arrays, or of those with one number a row [B]."""
  return NamedSharding(mesh, partition_spec(("batch", "seq")[:ndim], rules, "batch"))


_activations: contextvars.ContextVar[tuple[Mesh, AxisRules] | None] = contextvars.ContextVar(
  "activations", default=None
)


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, rules: AxisRules):
  """While tracing inside this context, `constrain` pins activations to the mesh; outside it does nothing."""
  token = _activations.set((mesh, rules))
  try:
    yield
  finally:
    _activations.reset(token)


def activation_context() -> tuple[Mesh, AxisRules] | None:
  """The mesh and the rules of the surrounding `activation_sharding`; None outside it or on one device."""
  context = _activations.get()
  return None if context is None or context[0].size == 1 else context


def constrain(x: Array, *axes: str | None) -> Array:
  """Pins an activation to the sharding that its logical axes have, so that the compiler gathers weights
  and not activations; the identity outside `activation_sharding`."""
  context = activation_context()
  if context is None:
    return x
  mesh, rules = context
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, rules, "activation")))


def ways_here(axis: str | None) -> int:
  """`ways` of the surrounding `activation_sharding`; 1 outside it."""
  context = activation_context()
  return 1 if context is None else ways(axis, *context)


def ways(axis: str | None, mesh: Mesh, rules: AxisRules) -> int:
  """Over how many devices the mesh splits a logical axis."""
  return math.prod(mesh.shape[mesh_axis] for mesh_axis in getattr(rules, axis)) if axis else 1

"""Weights are values: a parameter is a plain array, or a pytree that stands for a matrix and knows its arithmetic.

This file is the only place that multiplies by one. A plain array [I, O] may be float32 (a master weight) beside 16-bit
activations: each function rounds it where it uses it, and its gradient is summed over tokens in float32 and leaves in
its own dtype. A `QuantizedWeight` is a constant. A `PerLayer` holds the weights of a stack's layers apart, which may be
of different kinds. Adapters over any of them stand in `adapters.py`.

Stacks of layers and of experts put their axes before those of the matrix, in every part of a weight.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxllm.kernels import QuantizedWeight, dequantize, grouped_matmul
from jaxllm.kernels.matmul import matmul
from jaxllm.kernels.quantized import weights as quantized
from jaxllm.models.config import Compute
from jaxllm.parallel.kernels import quantized_matmul
from jaxllm.parallel.rows import add_rows
from jaxllm.parallel.sharding import LogicalAxes, constrain, ways_here

Ways = Callable[[str], int]  # over how many devices the mesh splits a logical axis
Split = tuple[tuple[str, ...], int] | None  # mesh axes, and which dimension of [E, I, O] lies over them


class Weight:
  """What is neither a plain array nor a `QuantizedWeight`: a registered dataclass with its own way of each product.

  Its `shape` and `dtype` are those of the matrix that it stands for. To add a kind, derive from this class.
  """

  shape: tuple[int, ...]
  dtype: Any

  @property
  def ndim(self) -> int:
    """Of the matrix, with the axes before it."""
    return len(self.shape)

  def project(self, x: Array, compute: Compute, axes: LogicalAxes | None, transposed: bool) -> Array:
    """See `project` and `project_transposed`."""
    raise NotImplementedError

  def rows(self, ids: Array, dtype: Any, axis: str | None) -> Array:
    """See `rows`."""
    return jnp.take(self.dense().astype(dtype), ids, axis=0)

  def grouped(self, x: Array, group_sizes: Array, compute: Compute, split: Split) -> Array:
    """See `grouped`."""
    raise NotImplementedError

  def dense(self) -> Array:
    """See `dense`."""
    raise NotImplementedError

  def map_parts(self, function: Callable[[Any], Any]) -> "Weight":
    """`function` applied to each weight and each plain array inside."""
    raise NotImplementedError

  def part_axes(self, axes: LogicalAxes, ways: Ways) -> Any:
    """See `part_axes`."""
    raise NotImplementedError

  def trained(self) -> Any:
    """See `trained_parts`."""
    raise NotImplementedError

  def with_key(self, path: str, key: jax.Array) -> "Weight":
    """See `with_keys`; path: of this weight."""
    return self

  def ready(self) -> "Weight":
    """See `ready`."""
    return self

  @property
  def adapted(self) -> bool:
    """Whether a trained part stands beside a frozen matrix."""
    return False

  def bare(self) -> Any:
    """The weight as it was before adapters."""
    return self


@dataclasses.dataclass(frozen=True)
class Around(Weight):
  """A weight around another one, its base, of whose shape and dtype it is."""

  base: Any

  @property
  def shape(self) -> tuple[int, ...]:  # type: ignore[override]
    return self.base.shape

  @property
  def dtype(self):  # type: ignore[override]
    return self.base.dtype


def register(*parts: str, settings: tuple[str, ...] = ()) -> Callable[[type], type]:
  """Makes a dataclass a pytree: its parts are arrays or weights, its settings static."""
  return functools.partial(jax.tree_util.register_dataclass, data_fields=parts, meta_fields=settings)


@register("layers")
@dataclasses.dataclass(frozen=True)
class PerLayer(Weight):
  """The weights of a stack's layers, one by one, in place of one weight with a leading layer axis."""

  layers: tuple[Any, ...]

  def __getitem__(self, layer: int) -> Any:
    return self.layers[layer]

  @property
  def shape(self) -> tuple[int, ...]:  # type: ignore[override]
    return (len(self.layers), *self.layers[0].shape)

  @property
  def dtype(self):  # type: ignore[override]
    return self.layers[0].dtype

  def dense(self):
    return jnp.stack([dense(layer) for layer in self.layers])

  def map_parts(self, function):
    return PerLayer(tuple(map(function, self.layers)))

  def part_axes(self, axes, ways):
    return PerLayer(tuple(part_axes(layer, axes[1:], ways) for layer in self.layers))

  def trained(self):
    return PerLayer(tuple(map(trained_parts, self.layers)))

  def with_key(self, path, key):
    return PerLayer(tuple(_with_key(f"{path}/{i}", layer, key) for i, layer in enumerate(self.layers)))

  @property
  def adapted(self):
    return any(map(is_adapted, self.layers))

  def bare(self):
    return self.map_parts(_bare)


# The products


def project(
  x: Float[Array, "*B I"], w: Any, compute: Compute, axes: LogicalAxes | None = None, dtype: Any = None
) -> Float[Array, "*B O"]:
  """x W for a weight W [I, O] with these logical axes, summed in float32, in x's dtype.

  Args:
    dtype: of the result of a plain matrix; None: x's.
  """
  if isinstance(w, Weight):
    return w.project(x, compute, axes, False)
  if isinstance(w, QuantizedWeight):
    return quantized_matmul(x, w, axes or (None, None), backend=compute.quantized_matmul, target=compute.target)
  return matmul(x, w, backend=compute.backend("matmul"), dtype=dtype)


def project_transposed(
  x: Float[Array, "*B O"], w: Any, compute: Compute, axes: LogicalAxes | None = None, dtype: Any = None
) -> Float[Array, "*B I"]:
  """x Wᵀ for a weight W [I, O]: a head that is tied to the embedding; dtype: as in `project`."""
  if isinstance(w, Weight):
    return w.project(x, compute, axes, True)
  if isinstance(w, QuantizedWeight):
    options = {"backend": compute.quantized_matmul, "target": compute.target}
    return quantized_matmul(x, w, axes or (None, None), transposed=True, **options)
  return matmul(x, w, backend=compute.backend("matmul"), transposed=True, dtype=dtype)


def rows(
  table: Any, ids: Int[Array, "B T"], dtype: Any, axis: str | None = None, columns: str | None = "embed"
) -> Float[Array, "B T D"]:
  """W[ids] of a table W [V, D], in `dtype`; rows past the table are NaN, in floating point.

  A table of 16 bits too has its gradient summed in float32 and rounded once: of a token that stands in the batch
  10,000 times, a sum in bfloat16 keeps a few hundred.

  Args:
    axis: the logical axis of the table's rows. columns: that of its columns.
  """
  if isinstance(table, Weight):
    return table.rows(ids, dtype, axis)
  if isinstance(table, QuantizedWeight):
    return quantized.rows(table, ids, dtype)
  return _rows(table, ids, jnp.dtype(dtype), axis, columns)


def grouped(
  x: Float[Array, "M I"], w: Any, group_sizes: Int[Array, " E"], compute: Compute, split: Split = None
) -> Float[Array, "M O"]:
  """Each row of x times the matrix of its group, of weights [E, I, O]; see `jaxllm.kernels.grouped_matmul`.

  Args:
    split: inside shard_map, over which mesh axes dimension 1 or 2 of the plain matrices lies.
  """
  if isinstance(w, Weight):
    return w.grouped(x, group_sizes, compute, split)
  if isinstance(w, QuantizedWeight):
    w = _gathered(w, split)
    features = min(w.in_features, w.padded_features)  # of a device's part
    w, split = dequantize(dataclasses.replace(w, in_features=features), x.dtype), None
  if jnp.promote_types(w.dtype, x.dtype) != w.dtype:
    w = w.astype(x.dtype)
  return grouped_matmul(x, w, group_sizes, backend=compute.grouped_matmul, target=compute.target, split=split)


def ready(w: Any) -> Any:
  """The weight for a place where each device has its own part of it at hand: what is of the whole is computed."""
  return w.ready() if isinstance(w, Weight) else w


def dense(w: Any, dtype: Any = None) -> Array:
  """The matrix as a plain array, for products that no function of this file knows.

  Args:
    dtype: None: its own, which is float32 for what is quantized or summed.
  """
  w = w.dense() if isinstance(w, Weight) else _plain(w)
  return w if dtype is None else w.astype(dtype)


def _plain(w):
  return dequantize(w) if isinstance(w, QuantizedWeight) else jnp.asarray(w)


def _gathered(w: QuantizedWeight, split: Split) -> QuantizedWeight:
  """A quantized stack of experts whole along the dimension that lies over a mesh axis: its codes travel."""
  if split is None:
    return w
  axes, dimension = split
  gather = functools.partial(lax.all_gather, axis_name=axes, tiled=True)
  if dimension == 2:
    values, others = gather(w.values, axis=w.values.ndim - 2), lambda a: gather(a, axis=a.ndim - 1)
  elif w.padded_features >= w.in_features:  # a block or a group would have been cut: it is whole
    return w
  else:
    values = gather(w.values, axis=w.values.ndim - 1)
    others = lambda a: a if w.group_size is None else gather(a, axis=a.ndim - 2)  # noqa: E731
  return dataclasses.replace(w, values=values, scales=others(w.scales), zeros=jax.tree.map(others, w.zeros))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rows(table, ids, dtype, axis, columns):
  # FSDP gathers the table, not the activations: a lookup in a table split along D would come out split so. Rounded
  # where it is split, so that 16 bits travel.
  rounded = constrain(table.astype(dtype), axis, columns)
  whole = constrain(rounded, axis, None)
  if ids.size == 1 and axis is not None and ways_here(axis) > 1:
    # A lookup of one row becomes a slice, and a slice of what is split brings all of it to every device.
    return jnp.take(whole, jnp.broadcast_to(ids, (2, *ids.shape[1:])), axis=0)[:1]
  return jnp.take(whole, ids, axis=0)


def _rows_forward(table, ids, dtype, axis, columns):
  return _rows(table, ids, dtype, axis, columns), (table, ids)


def _rows_backward(dtype, axis, columns, saved, dy):
  table, ids = saved
  return add_rows(dy, ids, table.shape[0], axis, columns).astype(table.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


# Maps over trees of parameters


def is_weight(value: Any) -> bool:
  """Whether a value in a tree of parameters stands for a matrix in parts; such a one is a leaf of the tree."""
  return isinstance(value, Weight | QuantizedWeight)


def is_per_layer(value: Any) -> bool:
  """Whether a parameter is kept layer by layer."""
  return isinstance(value, PerLayer)


def map_weights(function: Callable, params: PyTree, *rest: PyTree) -> PyTree:
  """`jax.tree.map` with weights as leaves."""
  return jax.tree.map(function, params, *rest, is_leaf=is_weight)


def map_weights_with_path(function: Callable, params: PyTree, *rest: PyTree) -> PyTree:
  """`map_weights` of a function whose first argument is the path, like "blocks/attention/query/weight"."""

  def one(path, *leaves):
    return function(jax.tree_util.keystr(path, simple=True, separator="/"), *leaves)

  return jax.tree_util.tree_map_with_path(one, params, *rest, is_leaf=is_weight)


def cast(params: PyTree, dtype: Any) -> PyTree:
  """Plain floating arrays in `dtype`, those inside weights too; codes and their scales stay as they are."""

  def one(w):
    if isinstance(w, Weight):
      return w.map_parts(one)
    floating = not isinstance(w, QuantizedWeight) and jnp.issubdtype(w.dtype, jnp.floating)
    return w.astype(dtype) if floating else w

  return map_weights(one, params)


def is_quantizable(path: str) -> bool:
  """Whether a parameter is a matrix of the layers, not of a router: those that lose little in 8 or 4 bits."""
  names = path.split("/")
  return names[-1] == "weight" and "blocks" in names and names[-2] != "router"


def part_axes(w: Any, axes: LogicalAxes, ways: Ways) -> Any:
  """The logical axes of each part of a weight whose matrix has these, in the weight's own structure.

  A quantized weight lies transposed, and a block or group of its codes is split whole or not at all: where the mesh
  cannot do that its inputs are not split.
  """
  if isinstance(w, Weight):
    return w.part_axes(axes, ways)
  if not isinstance(w, QuantizedWeight):
    return axes
  return dataclasses.replace(w, **quantized.part_axes(w, axes, ways))


def trained_parts(w: Any) -> Any:
  """Which parts of a weight are trained where it is: a tree of bools like it. Codes and their scales never are."""
  if isinstance(w, Weight):
    return w.trained()
  return jax.tree.map(lambda part: not is_weight(w) and jnp.issubdtype(part.dtype, jnp.floating), w)


def path_key(key: jax.Array, path: str) -> jax.Array:
  """A random key of one parameter's own, whichever others there are."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def with_keys(params: PyTree, key: jax.Array) -> PyTree:
  """The parameters with a random key in every weight that drops a part of its input."""

  return map_weights_with_path(lambda path, w: _with_key(path, w, key), params)


def _with_key(path, w, key):
  return w.with_key(path, key) if isinstance(w, Weight) else w


def partition(params: PyTree, trained: PyTree[bool]) -> tuple[PyTree, PyTree]:
  """Two trees like `params`, the trained arrays and the others; where an array is in the other tree there is None."""
  take = lambda wanted: jax.tree.map(lambda x, is_trained: x if is_trained == wanted else None, params, trained)  # noqa: E731
  return take(True), take(False)


def combine(trained: PyTree, frozen: PyTree) -> PyTree:
  """The inverse of `partition`."""
  return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)


def num_parameters(params: PyTree) -> int:
  """How many numbers the parameters stand for, adapters' too."""
  leaves = jax.tree.leaves(params, is_leaf=lambda w: is_weight(w) and not is_adapted(w))
  return sum(math.prod(leaf.shape) for leaf in leaves)


def is_adapted(w: Any) -> bool:
  """Whether a weight has an adapter."""
  return isinstance(w, Weight) and w.adapted


def without_adapters(params: PyTree) -> PyTree:
  """The parameters as they were before adapters: the same arrays, no copies."""
  return map_weights(_bare, params)


def _bare(w):
  return w.bare() if isinstance(w, Weight) else w

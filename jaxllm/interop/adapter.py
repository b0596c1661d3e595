"""An adapter in files: what it adds to which parameters, apart from them or merged into them."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxllm.base.errors import ConfigError
from jaxllm.interop.tensors import Index, LazyTensor, Tensors, from_parts
from jaxllm.models.lora import DoraWeight, LoraWeight
from jaxllm.models.weights import PerLayer, part_axes
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import LogicalAxes, partition_spec, ways


@dataclasses.dataclass(frozen=True)
class Change:
  """What an adapter makes of a parameter [*lead, I, O]: see `LoraWeight` and `DoraWeight`.

  a: [*lead, I, r], b: [*lead, r, O], filled up with zeros where a matrix of the stack has a smaller rank.
  scales: [*lead], of each matrix. where: [*lead], which of them are changed at all. magnitude: [*lead, O], None: LoRA.
  """

  a: LazyTensor
  b: LazyTensor
  scales: np.ndarray
  where: np.ndarray
  magnitude: LazyTensor | None = None
  dropout: float = 0.0

  @property
  def rank(self) -> int:
    """The largest of its matrices."""
    return self.a.shape[-1]

  @property
  def parts(self) -> dict[str, LazyTensor]:
    """What is trained, by the names of a weight's parts."""
    return {"a": self.a, "b": self.b} | ({} if self.magnitude is None else {"magnitude": self.magnitude})

  def over(self, base: Any, parts: Mapping[str, Any]) -> LoraWeight:
    """The weight over a whole stack.

    Args:
      base: any weight. parts: arrays in place of `parts`, or ShapeDtypeStructs.

    Raises:
      ConfigError: a DoRA that leaves out some layers, whose magnitudes would be trained.
    """
    if self.magnitude is not None and not self.where.all():
      raise ConfigError("a DoRA adapter of some of the layers can be used or merged, but not trained here")
    used = self.scales[self.where]
    scale, scales = float(used.flat[0]), None
    if not (used == scale).all():
      scale, scales = 1.0, jnp.asarray(self.scales, jnp.float32)
    make = LoraWeight if self.magnitude is None else DoraWeight
    return make(base, scales=scales, scale=scale, dropout=self.dropout, **parts)

  def of_layer(self, i: int) -> "Change":
    """That of one layer of the stack."""
    part = lambda t: None if t is None else LazyTensor(t.shape[1:], t.dtype, functools.partial(t.part, (i,)))  # noqa: E731
    scales, where = np.asarray(self.scales[i]), np.asarray(self.where[i])
    return dataclasses.replace(
      self, a=part(self.a), b=part(self.b), magnitude=part(self.magnitude), scales=scales, where=where
    )

  def merged(self, tensor: LazyTensor, dtype: Any = None) -> LazyTensor:
    """The parameter with the change in it, each matrix when it is read; summed in float32.

    Args:
      dtype: of the result; None: the tensor's.
    """
    dtype = np.dtype(dtype or tensor.dtype)

    def matrix(index: Index) -> np.ndarray:
      w = tensor.part(index)
      if not self.where[index]:
        return w.astype(dtype)
      change = np.matmul(*(t.part(index).astype(np.float32) for t in (self.a, self.b)))
      total = w.astype(np.float32) + change * np.float32(self.scales[index])
      if self.magnitude is not None:
        total *= self.magnitude.part(index).astype(np.float32) / np.linalg.norm(total, axis=-2)
      return total.astype(dtype)

    return from_parts(tensor.shape, dtype, len(tensor.shape) - 2, matrix)


@dataclasses.dataclass(frozen=True)
class StoredAdapter:
  """An adapter of which nothing but its settings is in memory.

  settings: adapter_config.json. changes: by parameter. full: the parameters that it replaces. partly: of those, the
  stacks of which it replaces some layers only.
  """

  settings: dict[str, Any]
  changes: Mapping[str, Change]
  full: Tensors
  path: Path | None = None
  partly: tuple[str, ...] = ()

  @property
  def kind(self) -> str:
    """As `peft.kind` has it."""
    return "dora" if any(change.magnitude is not None for change in self.changes.values()) else "lora"

  def weighted(self, weight: float) -> "StoredAdapter":
    """The adapter with its changes multiplied, as in a weighted sum of several.

    Raises:
      ConfigError: the weight is no number, or there is more to the adapter than sums.
    """
    if weight == 1:
      return self
    if not math.isfinite(weight):
      raise ConfigError(f"the weight of the adapter in {self.path} is {weight}; it must be a number")
    if self.full or self.kind == "dora":
      what = f"replaces {min(self.full)}" if self.full else "has magnitudes (DoRA)"
      raise ConfigError(f"the adapter in {self.path} {what}, so it cannot be taken with a weight of {weight:g}")
    changes = {path: dataclasses.replace(c, scales=c.scales * weight) for path, c in self.changes.items()}
    return dataclasses.replace(self, changes=changes)

  def merged(self, tensors: Tensors) -> dict[str, LazyTensor]:
    """A model's parameters with the adapter's changes in them, those that it changes in float32."""
    return dict(tensors) | {path: change.merged(tensors[path], np.float32) for path, change in self.changes.items()}


def place(change: Change, base: Any, axes: LogicalAxes, mesh: Mesh | None, rules: AxisRules) -> Any:
  """The weight over a base that is on its devices; beside a `PerLayer` each layer has a weight of its own.

  Args:
    axes: the logical axes of the parameter. mesh: None: this process's first device.
  """
  if isinstance(base, PerLayer):
    layers = (place(change.of_layer(i), layer, axes[1:], mesh, rules) for i, layer in enumerate(base.layers))
    return PerLayer(tuple(layers))
  if not change.where.any():
    return base
  arrays = {name: np.asarray(tensor.read(), np.float32) for name, tensor in change.parts.items()}
  weight = change.over(base, arrays)
  if mesh is None:
    here: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    return dataclasses.replace(weight, **{name: jax.device_put(x, here) for name, x in arrays.items()})
  names = part_axes(weight, axes, lambda axis: ways(axis, mesh, rules))
  put = lambda x, own: jax.make_array_from_callback(  # noqa: E731
    x.shape, NamedSharding(mesh, partition_spec(own, rules)), lambda index: x[index]
  )
  arrays |= {} if weight.scales is None else {"scales": np.asarray(weight.scales)}
  return dataclasses.replace(weight, **{name: put(x, getattr(names, name)) for name, x in arrays.items()})

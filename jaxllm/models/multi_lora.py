"""Several adapters over one weight, and a batch whose tokens are under different ones.

All adapters' factors lie side by side along the rank: of the narrow product each token keeps the columns of its own
adapter, and the second product adds nothing for the rest. So any mix costs two thin products, and no shape depends on
who is in the batch (the aim of Punica, arXiv 2310.18547, and S-LoRA, arXiv 2311.03285, which gather factors instead).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels.matmul import matmul
from jaxllm.models.build import Params
from jaxllm.models.lora import DoraWeight, LoraWeight
from jaxllm.models.weights import (
  Around,
  PerLayer,
  is_adapted,
  is_per_layer,
  map_weights,
  map_weights_with_path,
  part_axes,
  project,
  project_transposed,
  register,
  rows,
  without_adapters,
)

Adapter = Mapping[str, Any]  # by the path of a parameter: a LoraWeight without base, or a PerLayer of such and of None


@register("base", "a", "b", "owner", "factors", "index")
@dataclasses.dataclass(frozen=True)
class MultiLoraWeight(Around):
  """base + a_i b_i for a token under the adapter i, and base alone for one under 0.

  base: any weight [I, O]. a [I, R], b [R, O]: of all adapters, side by side along the rank; scales are in b.
  owner: whose each column of a is, counted from 1.
  factors: by what each output is multiplied after that (DoRA), under each adapter; None: nothing is.
  index: which adapter each token is under, put there by `with_adapters`; None: all are under 0.
  """

  base: Any
  a: Float[Array, "I R"]
  b: Float[Array, "R O"]
  owner: Int[Array, " R"]
  factors: Float[Array, "n O"] | None = None
  index: Int[Array, "#B #T"] | None = None

  def _change(self, narrow, compute, second, transposed):
    # A choice and not a product: what is not finite in one adapter's columns stays out of the others' tokens
    own = jnp.where(self.owner == self.index[..., None], narrow, 0)
    return matmul(own, second, backend=compute.backend("matmul"), transposed=transposed)

  def _multiplied(self, y):
    return y if self.factors is None else y * self.factors[self.index].astype(y.dtype)

  def project(self, x, compute, axes, transposed):
    product = project_transposed if transposed else project
    if self.index is None:
      return product(x, self.base, compute, axes)
    x = self._multiplied(x) if transposed else x
    first, second = (self.b, self.a) if transposed else (self.a, self.b)
    narrow = matmul(x, first, backend=compute.backend("matmul"), transposed=transposed)
    y = product(x, self.base, compute, axes) + self._change(narrow, compute, second, transposed)
    return y if transposed else self._multiplied(y)

  def rows(self, ids, dtype, axis):
    y = rows(self.base, ids, dtype, axis)
    if self.index is None:
      return y
    own = jnp.where(self.owner == self.index[..., None], rows(self.a, ids, dtype, axis, None), 0)
    return self._multiplied(y + matmul(own, self.b))

  def map_parts(self, function):
    return dataclasses.replace(self, base=function(self.base), a=function(self.a), b=function(self.b))

  def part_axes(self, axes, ways):
    inputs, outputs = axes
    return MultiLoraWeight(
      part_axes(self.base, axes, ways),
      (inputs, None),
      (None, outputs),
      (None,),
      None if self.factors is None else (None, outputs),
      None if self.index is None else (None,) * self.index.ndim,
    )

  def trained(self):
    return jax.tree.map(lambda _: False, self)

  def bare(self):
    return without_adapters(self.base)


def adapter_of(params: Params) -> dict[str, Any]:
  """The adapters in a tree of parameters, without the weights under them, which nothing keeps in memory then."""
  found: dict[str, Any] = {}

  def one(path, w):
    if is_adapted(w):
      found[path] = _alone(w)

  map_weights_with_path(one, params)
  return found


def _alone(w):
  if is_per_layer(w):
    return w.map_parts(_alone)
  return dataclasses.replace(w, base=_alone(w.base)) if is_adapted(w) else None


def with_several(params: Params, adapters: Sequence[Adapter]) -> Params:
  """The parameters with a `MultiLoraWeight` in place of each weight that any adapter changes; of stacked layers each
  must be apart (`unstack_layers`). `with_adapters` says afterwards who is under which.

  Raises:
    ConfigError: an adapter changes what is not here, a matrix of another shape, or one that cannot differ within a
      batch. The message names the parameter.
  """
  left = {path for adapter in adapters for path in adapter}

  def one(path, w):
    left.discard(path)
    own = [adapter.get(path) for adapter in adapters]
    if all(adapter is None for adapter in own):
      return w
    if not is_per_layer(w):
      return _several(path, w, own)
    layers = ([None if adapter is None else _layer(adapter, i) for adapter in own] for i in range(len(w.layers)))
    return PerLayer(tuple(_several(path, layer, each) for layer, each in zip(w.layers, layers)))

  found = map_weights_with_path(one, params)
  if left:
    raise ConfigError(f"the model has no {min(left)}")
  return found


def _layer(adapter: Any, i: int) -> Any:
  return adapter[i] if is_per_layer(adapter) else jax.tree.map(lambda part: part[i], adapter)


def _several(path: str, base: Any, adapters: Sequence[Any]) -> Any:
  parts = [(number, part) for number, adapter in enumerate(adapters, 1) for part in _chain(path, adapter)]
  if not parts:
    return base
  if base.ndim != 2:
    raise ConfigError(f"{path} is of experts, whose tokens are sorted: it cannot differ within a batch")
  for _, part in parts:
    if (shape := (part.a.shape[-2], part.b.shape[-1])) != base.shape:
      raise ConfigError(f"{path} is {list(base.shape)} here and {list(shape)} in the adapter")
  factors = None
  if any(isinstance(part, DoraWeight) for _, part in parts):
    each: list[Any] = [jnp.ones(base.shape[1], jnp.float32)] * (len(adapters) + 1)
    for number, part in parts:
      if isinstance(part, DoraWeight):
        each[number] = dataclasses.replace(part, base=base).factor()
    factors = jnp.stack(each)
  owner = [number for number, part in parts for _ in range(part.rank)]
  a = jnp.concatenate([part.a for _, part in parts], axis=1)
  b = jnp.concatenate([part.scaled_b for _, part in parts], axis=0)
  return MultiLoraWeight(base, a, b, jnp.asarray(owner, jnp.int32), factors)


def _chain(path: str, w: LoraWeight | None) -> list[LoraWeight]:
  """The adapters of one weight, from the outermost on: their changes add up."""
  found = []
  while w is not None:
    found.append(w)
    w = w.base
  if len(found) > 1 and any(isinstance(part, DoraWeight) for part in found):
    raise ConfigError(f"{path} has a DoRA adapter beside another one; merge the inner one into the model")
  return found


def with_adapters(params: Params, index: Int[Array, "#B #T"]) -> Params:
  """The parameters for tokens of which each is under the adapter with this number; 0: under none."""

  def one(w):
    if is_per_layer(w):
      return w.map_parts(one)
    return dataclasses.replace(w, index=index) if isinstance(w, MultiLoraWeight) else w

  return map_weights(one, params)

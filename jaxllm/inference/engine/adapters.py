"""The adapters of an engine: who may be asked for, and their factors beside the base's weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding

from jaxllm.base.errors import ConfigError
from jaxllm.models.build import Params, declare
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.multi_lora import Adapter, MultiLoraWeight, with_several
from jaxllm.models.weights import is_per_layer, map_weights_with_path, part_axes
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import partition_spec, ways

PARTS = ("a", "b", "owner", "factors")


class Adapters:
  """Adapters by name; 0 is the number of the model without any.

  Raises:
    ConfigError: an adapter holds numbers that are not finite, which would reach other requests, or changes what no
      token can have to itself.
  """

  def __init__(self, config: ModelConfig, adapters: Mapping[str, Adapter]):
    self._config, self.names = config, tuple(adapters)
    self._adapters = tuple(adapters.values())
    for name, adapter in adapters.items():
      if not adapter:
        raise ConfigError(f"the adapter {name!r} changes nothing")
      for path, weight in adapter.items():
        if not all(bool(jnp.isfinite(part).all()) for part in jax.tree.leaves(weight)):
          raise ConfigError(f"the adapter {name!r} has numbers of {path} that are not finite")
        if config.mla is not None and path.endswith(("attention/key/weight", "attention/value/weight")):
          raise ConfigError(
            f"the adapter {name!r} changes {path}, which a cache of latents moves over to queries and outputs of all "
            "rows; load the model with this adapter alone"
          )

  def __bool__(self) -> bool:
    return bool(self.names)

  def number(self, name: str | None) -> int:
    """Of a request's adapter. Raises ConfigError where there is none of that name."""
    if name is None:
      return 0
    if name not in self.names:
      there = f"there are {', '.join(self.names)}" if self.names else "this engine has none"
      raise ConfigError(f"there is no adapter {name!r}; {there}")
    return self.names.index(name) + 1

  def over(self, params: Params, compute: Compute, mesh: Mesh | None, rules: AxisRules) -> Params:
    """The weights, each layer apart, with all adapters beside them, in `compute.dtype` and on the same devices.

    Raises:
      ConfigError: they do not fit, and which and why.
    """
    if not self:
      return params
    for name, adapter in zip(self.names, self._adapters):
      try:
        jax.eval_shape(lambda adapter=adapter: with_several(params, [adapter]))
      except ConfigError as error:
        raise ConfigError(f"the adapter {name!r} does not fit: {error}") from None
    axes = traverse_util.flatten_dict(declare(self._config, compute)[2], sep="/")

    def one(path, w):
      if is_per_layer(w):
        return w.map_parts(lambda layer: self._placed(layer, axes[path][1:], compute, mesh, rules))
      return self._placed(w, axes[path], compute, mesh, rules)

    return map_weights_with_path(one, with_several(params, self._adapters))

  @staticmethod
  def _placed(w: Any, axes, compute: Compute, mesh: Mesh | None, rules: AxisRules) -> Any:
    if not isinstance(w, MultiLoraWeight):
      return w
    w = dataclasses.replace(w, a=w.a.astype(compute.dtype), b=w.b.astype(compute.dtype))
    if mesh is None:
      return w
    names = part_axes(w, axes, lambda axis: ways(axis, mesh, rules))
    put = lambda x, own: jax.device_put(x, NamedSharding(mesh, partition_spec(own, rules)))  # noqa: E731
    parts = {name: getattr(w, name) for name in PARTS}
    return dataclasses.replace(w, **{k: put(x, getattr(names, k)) for k, x in parts.items() if x is not None})


def one_each(adapter: str | Sequence[str | None] | None, count: int) -> list[str | None]:
  """The adapter of each of so many texts, given one for all or a list.

  Raises:
    ConfigError: the list is of another length.
  """
  if adapter is None or isinstance(adapter, str):
    return [adapter] * count
  if len(adapter) != count:
    raise ConfigError(f"{len(adapter)} adapters for {count} texts; give one, or one for each")
  return list(adapter)

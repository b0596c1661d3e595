"""The adapters of an engine: who may be asked for, and their factors beside the base's weights."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.base.errors import ConfigError
from jaxllm.models.build import Params
from jaxllm.models.config import ModelConfig
from jaxllm.models.multi_lora import Adapter, MultiLoraWeight, with_several
from jaxllm.models.weights import is_per_layer, map_weights
from jaxllm.parallel.sharding import replicated


class Adapters:
  """Adapters by name; 0 is the number of the model without any.

  Args:
    dtype: in which they compute.

  Raises:
    ConfigError: an adapter holds numbers that are not finite, which would reach other requests, or changes what no
      token can have to itself.
  """

  def __init__(self, config: ModelConfig, adapters: Mapping[str, Adapter], dtype: str):
    self.names, self._dtype = tuple(adapters), dtype
    self._adapters = jax.tree.map(jnp.asarray, tuple(adapters.values()))
    for name, adapter in zip(self.names, self._adapters):
      if not adapter:
        raise ConfigError(f"the adapter {name!r} changes nothing")
      for path, weight in adapter.items():
        if not all(bool(jnp.isfinite(part.astype(dtype)).all()) for part in jax.tree.leaves(weight)):
          raise ConfigError(f"the adapter {name!r} has numbers of {path} that are not finite in {dtype}")
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

  def over(self, params: Params, mesh: Mesh | None) -> Params:
    """The weights, each layer apart and on their devices, with all adapters beside them.

    Raises:
      ConfigError: an adapter does not fit, and which and why.
    """
    for name, adapter in zip(self.names, self._adapters):
      try:
        jax.eval_shape(lambda adapter=adapter: with_several(params, [adapter]))
      except ConfigError as error:
        raise ConfigError(f"the adapter {name!r} does not fit: {error}") from None
    there = jax.tree.leaves(params)[0].sharding
    whole = there if mesh is None else replicated(mesh)
    beside = lambda x: x if x.sharding.device_set == there.device_set else jax.device_put(x, whole)  # noqa: E731

    def one(w):
      if is_per_layer(w):
        return w.map_parts(one)
      if not isinstance(w, MultiLoraWeight):
        return w
      owner = jax.device_put(w.owner, whole)  # or every step would bring it there
      return dataclasses.replace(w, a=w.a.astype(self._dtype), b=w.b.astype(self._dtype), owner=owner)

    return map_weights(one, with_several(params, jax.tree.map(beside, self._adapters)))


def one_each(adapter: str | Sequence[str | None] | None, count: int) -> list[str | None]:
  """The adapter of each of so many texts, given one for all or a list.

  Raises:
    ConfigError: the list is of another length, or it is none.
  """
  if adapter is None or isinstance(adapter, str):
    return [adapter] * count
  if not isinstance(adapter, Sequence):
    raise ConfigError(f"adapter is {adapter!r}; it must be a name, or a list of one for each text")
  if len(adapter) != count:
    raise ConfigError(f"{len(adapter)} adapters for {count} texts; give one, or one for each")
  return list(adapter)

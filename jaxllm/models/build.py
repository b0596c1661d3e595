"""A model as the rest of the package uses it: a static graph and a plain dict of parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.errors import ConfigError
from jaxllm.models.attention import KVCache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.transformer import PerLayer, Transformer, is_per_layer
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import param_shardings

Params = dict[str, Any]


def declare(config: ModelConfig, compute: Compute = Compute()) -> tuple[nnx.GraphDef, Params, Params]:
  """The model's graph, its parameters' shapes and their logical axes; nothing is allocated.

  Returns:
    graph: `nnx.merge(graph, params)` is the callable model.
    shapes: nested dict of ShapeDtypeStructs.
    axes: nested dict of logical axis tuples.
  """
  with nnx.use_eager_sharding(False):
    module = nnx.eval_shape(lambda: Transformer(config, compute, rngs=nnx.Rngs(params=0)))
  graph, state = nnx.split(module)
  flat = nnx.to_flat_state(state)
  axes = {path: variable.get_metadata()["out_sharding"] for path, variable in flat}
  shapes = {path: variable.get_value() for path, variable in flat}
  return graph, _nest(shapes), _nest(axes)


def init_params(
  config: ModelConfig, key: jax.Array, mesh: Mesh | None = None, rules: AxisRules = AxisRules()
) -> Params:
  """Fresh float32 parameters; with a mesh each is made where it lives, never whole on one device."""

  def init(key):
    with nnx.use_eager_sharding(False):
      module = Transformer(config, Compute(), rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.split(module)[1])

  if mesh is None:
    return jax.jit(init)(key)
  check_model_on_mesh(config, mesh, rules)
  _, shapes, axes = declare(config)
  return jax.jit(init, out_shardings=param_shardings(shapes, axes, mesh, rules))(key)


def check_model_on_mesh(config: ModelConfig, mesh: Mesh, rules: AxisRules = AxisRules()) -> None:
  """That every device gets whole heads, and equal parts of the other dimensions.

  Raises:
    ConfigError: a size that its mesh axes do not divide; the message names the two settings.
  """
  sizes = {
    "num_kv_heads": "kv_heads",
    "num_heads": "heads",
    "embed_dim": "embed",
    "mlp_dim": "mlp",
    "vocab_size": "vocab",
  }
  for name, axis in sizes.items():
    mesh_axes = getattr(rules, axis)
    ways = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
    size = getattr(config, name)
    if size % ways:
      split = " x ".join(f"mesh.{mesh_axis}" for mesh_axis in mesh_axes)
      raise ConfigError(
        f"model.{name} {size} is not divisible by {split} = {ways}; change one, "
        f"or keep it whole with mesh.rules.{axis} = ()"
      )


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> KVCache:
  """An empty cache for `batch` rows of up to `length` tokens."""
  shape = (batch, length, config.num_kv_heads, config.head_dim)
  empty = lambda: tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))  # noqa: E731
  return KVCache(empty(), empty(), jnp.zeros((batch,), jnp.int32))


def unstack_layers(params: Params) -> Params:
  """The same parameters with a `PerLayer` for every stacked array under "blocks": what decoding wants."""
  # Indexed and not iterated over, which would bring every layer to one device.
  layers = lambda w: PerLayer(tuple(w[i] for i in range(w.shape[0])))  # noqa: E731
  return {**params, "blocks": jax.tree.map(layers, params["blocks"])}


def stack_layers(params: Params) -> Params:
  """The inverse of `unstack_layers`: plain arrays with a leading layer axis."""
  blocks = jax.tree.map(lambda w: jnp.stack(w.arrays), params["blocks"], is_leaf=is_per_layer)
  return {**params, "blocks": blocks}


def _nest(flat: dict[tuple, Any]) -> Params:
  tree: Params = {}
  for path, value in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = value
  return tree

"""A model as the rest of the package uses it: a static graph and a plain dict of parameters."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxllm.base.errors import ConfigError
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.transformer import Transformer
from jaxllm.models.weights import PerLayer, is_per_layer, map_weights, part_axes
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import param_shardings, ways

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


def described(params: Params, axes: Params, mesh: Mesh, rules: AxisRules = AxisRules()) -> Params:
  """ShapeDtypeStructs of parameters, with the shardings that their matrices' logical axes have.

  Args:
    params: arrays or shapes, weights of any kind among them.
    axes: logical axes of the model's matrices, stacked, as `declare` gives them.
  """
  parts = map_weights(lambda w, names: part_axes(w, names, lambda axis: ways(axis, mesh, rules)), params, axes)
  shardings = param_shardings(params, parts, mesh, rules)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)


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
  values = {name: getattr(config, name) for name in sizes}
  if config.moe is not None:
    sizes |= {"moe.num_experts": "expert", "moe.mlp_dim": "mlp"}
    values |= {"moe.num_experts": config.moe.num_experts, "moe.mlp_dim": config.moe.mlp_dim}
  for name, axis in sizes.items():
    mesh_axes = getattr(rules, axis)
    count = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
    size = values[name]
    if size % count:
      split = " x ".join(f"mesh.{mesh_axis}" for mesh_axis in mesh_axes)
      raise ConfigError(
        f"model.{name} {size} is not divisible by {split} = {count}; change one, "
        f"or keep it whole with mesh.rules.{axis} = ()"
      )


def unstack_layers(params: Params) -> Params:
  """The same parameters with a `PerLayer` for every stacked weight under "blocks": what decoding wants.

  Those that are `PerLayer` already stay as they are.
  """

  def layers(w):
    # Indexed and not iterated over, which would bring every layer to one device.
    layer = lambda i: jax.tree.map(lambda part: part[i], w)  # noqa: E731
    return w if is_per_layer(w) else PerLayer(tuple(layer(i) for i in range(w.shape[0])))

  return _map_blocks(lambda blocks: map_weights(layers, blocks), params)


def stack_layers(params: Params) -> Params:
  """The inverse of `unstack_layers`: every weight with a leading layer axis.

  A `PerLayer` whose layers are of several kinds, as adapters of some of them make it, stays one.
  """

  def whole(w):
    kinds = {(jax.tree.structure(layer), tuple(part.shape for part in jax.tree.leaves(layer))) for layer in w.layers}
    return w if len(kinds) > 1 else jax.tree.map(lambda *parts: jnp.stack(parts), *w.layers)

  return _map_blocks(lambda blocks: map_weights(whole, blocks), params)


def _map_blocks(change: Callable[[Params], Params], params: Params) -> Params:
  """The parameters with `change` applied to the decoder's blocks and the encoder's."""
  params = {**params, "blocks": change(params["blocks"])}
  return params | {"encoder": _map_blocks(change, params["encoder"])} if "encoder" in params else params


def _nest(flat: dict[tuple, Any]) -> Params:
  tree: Params = {}
  for path, value in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = value
  return tree

"""A model in files: what it is, and its weights, which are read when they are asked for."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.interop.adapter import StoredAdapter, place
from jaxllm.interop.sentence_transformers import TextVectors
from jaxllm.interop.tensors import LazyTensor, Tensors, cast, from_parts
from jaxllm.models.build import Params, declare
from jaxllm.models.config import ModelConfig
from jaxllm.models.weights import PerLayer, dense, is_weight
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import param_shardings

DTYPES = ("float32", "bfloat16", "float16")
Form = Literal["jaxllm", "run", "hf", "adapter", "gguf"]


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """A model of which nothing but the weights is in memory.

  Attributes:
    tensors: the weights by parameter path ("blocks/attention/query/weight"), layers stacked.
    tokenizer: its chat templates included; None: a model of bare token ids.
    generation: eos_token_id and default sampling settings, by Hugging Face's names.
    source: what its config.json of Hugging Face said that `config` has no place for, see `directory_files.Source`.
    path: where it was opened, None: it comes from memory. form: as what.
    run: of a training run the groups of its config.json: run["data"]["dir"], run["objective"]["name"], …
    adapters: the adapter_config.json of each adapter on it, in their order.
    apart: those of them that are not merged into `tensors`.
    vectors: how a text's states become one vector, where the files say so.
    was_tied: the head is the embedding in files, and has become a matrix of its own for an adapter.
  """

  config: ModelConfig
  tensors: Tensors
  tokenizer: Tokenizer | None = None
  generation: dict[str, Any] = dataclasses.field(default_factory=dict)
  path: Path | None = None
  form: Form | None = None
  run: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  adapters: tuple[dict[str, Any], ...] = ()
  apart: tuple[StoredAdapter, ...] = ()
  source: dict[str, Any] = dataclasses.field(default_factory=dict)
  vectors: TextVectors | None = None
  was_tied: bool = False

  @property
  def chat_template(self) -> str | None:
    """Jinja source of the chat template that is used where none is named."""
    return None if self.tokenizer is None else self.tokenizer.chat_templates.get("default")

  @property
  def dtype(self) -> str:
    """The type of the embedding's weights, which is that of all of them but in rare files."""
    return self.tensors["embedding/tokens"].dtype.name

  def cast(self, dtype: str | None) -> "StoredModel":
    """The same model with weights of this type, to which they are converted as they are read; None: as they are.

    Raises:
      ConfigError: an impossible dtype.
    """
    check_dtype(dtype)
    return self if dtype is None else dataclasses.replace(self, tensors=cast(self.tensors, jnp.dtype(dtype)))

  def merged(self, dtype: str | None = None) -> "StoredModel":
    """The same model with its adapters merged into its tensors, each when it is read, summed in float32.

    Args:
      dtype: of all weights; None: as they are without the adapters. Raises ConfigError where it is an impossible one.
    """
    check_dtype(dtype)
    tensors = self.tensors
    for adapter in self.apart:
      tensors = adapter.merged(tensors)
    types = {path: jnp.dtype(dtype or tensor.dtype) for path, tensor in self.tensors.items()}
    tensors = {path: cast({path: tensor}, types[path])[path] for path, tensor in tensors.items()}
    return dataclasses.replace(self, tensors=tensors, apart=())

  def untied(self) -> "StoredModel":
    """The same model with a head of its own, where it was the embedding; merged, if an adapter changes both."""
    model = self.merged() if any("embedding/tokens" in adapter.changes for adapter in self.apart) else self
    config, table = dataclasses.replace(model.config, tie_embeddings=False), model.tensors["embedding/tokens"]
    head = LazyTensor(table.shape[::-1], table.dtype, lambda: table.read().T)
    tensors = dict(model.tensors) | {"head/weight": head}
    return dataclasses.replace(model, config=config, tensors=tensors, was_tied=True)

  def params(
    self,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    rules: AxisRules = AxisRules(),
    *,
    per_layer: bool = False,
  ) -> Params:
    """The weights on their devices, in a tree like that of `init_params`.

    Adapters that are apart stand in it as weights, in float32. Beside all these no more than a layer of one parameter
    is held in memory, of a run's no more than one parameter.

    Args:
      dtype: of all of them, "float32", "bfloat16" or "float16"; None: of each as it is stored.
      mesh: they are placed over its devices by `rules`; None: on this process's first device.
      per_layer: a `PerLayer` in place of each stacked array, as decoding wants them; on one device what files hold
        quantized stays so.

    Raises:
      CheckpointError: a tensor turns out damaged. ConfigError: an impossible dtype, or a mesh that does not
        divide the model.
    """
    tensors = self.cast(dtype).tensors
    _, shapes, axes = declare(self.config)
    here: Sharding = SingleDeviceSharding(jax.local_devices()[0])
    shardings: Mapping[str, Sharding] = {}
    if mesh is not None:
      shardings = traverse_util.flatten_dict(param_shardings(shapes, axes, mesh, rules), sep="/")
    placed: dict[str, Any] = {}
    for path in traverse_util.flatten_dict(shapes, sep="/"):
      in_files = self.tensors[path].quantized
      if in_files is not None and per_layer and mesh is None:
        placed[path] = PerLayer(tuple(jax.device_put(in_files((i,)), here) for i in range(tensors[path].shape[0])))
      else:
        placed[path] = _put(path, tensors[path], shardings.get(path, here), per_layer)
    logical = traverse_util.flatten_dict(axes, sep="/")
    for adapter in self.apart:
      for path, change in adapter.changes.items():
        placed[path] = place(change, placed[path], logical[path], mesh, rules)
    return traverse_util.unflatten_dict(placed, sep="/")

  def array(self, path: str, sharding: Sharding) -> Array:
    """One parameter on its devices, as it is stored. Raises CheckpointError when it turns out damaged."""
    return _put(path, self.tensors[path], sharding, per_layer=False)  # type: ignore[return-value]


def check_dtype(dtype: str | None) -> None:
  """Raises ConfigError unless weights can be of this type, or it is None."""
  if dtype is not None and dtype not in DTYPES:
    raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")


def tensors_of(params: Params) -> Tensors:
  """Parameters in memory as a `StoredModel` has them, taken from their devices part by part.

  Args:
    params: in a tree like that of `init_params`, or with a `PerLayer` for a stack.
  """

  def tensor(weight: Any) -> LazyTensor:
    if not isinstance(weight, PerLayer):
      return LazyTensor(weight.shape, jnp.dtype(weight.dtype), lambda: np.asarray(dense(weight, weight.dtype)))
    layers = weight.layers
    read = lambda index: np.asarray(dense(layers[index[0]], weight.dtype))  # noqa: E731
    return from_parts(weight.shape, jnp.dtype(weight.dtype), 1, read)

  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight)
  return {jax.tree_util.keystr(keys, simple=True, separator="/"): tensor(leaf) for keys, leaf in leaves}


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Path -> shape of every parameter, stacked as `declare` has them."""
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(declare(config)[1], sep="/").items()}


def check_shapes(config: ModelConfig, tensors: Tensors, where: Path | str) -> None:
  """Raises CheckpointError unless these are the parameters, by path, of a model of this config."""
  shapes = param_shapes(config)
  for path in sorted(shapes.keys() | tensors.keys()):
    found, wanted = tensors[path].shape if path in tensors else None, shapes.get(path)
    if found != wanted:
      raise CheckpointError(
        f"the parameters in {where} do not fit config.json: {path} has shape {found}, the model's has {wanted}"
      )


def _put(path: str, tensor: LazyTensor, sharding: Sharding, per_layer: bool) -> Array | PerLayer:
  if "blocks" not in path.split("/"):
    return _on_devices(tensor.read(), sharding)
  one = sharding
  if isinstance(sharding, NamedSharding):
    one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
  read = tensor.part if tensor.read_part is not None else tensor.read().__getitem__
  layers = (_on_devices(read((i,)), one) for i in range(tensor.shape[0]))
  if per_layer:
    return PerLayer(tuple(layers))
  whole = jnp.zeros(tensor.shape, tensor.dtype, device=sharding)
  for i, layer in enumerate(layers):
    whole = jax.block_until_ready(_with_layer(whole, layer, i))  # or layers queue up
  return whole


@functools.partial(jax.jit, donate_argnums=0)
def _with_layer(whole: Array, layer: Array, i: int) -> Array:
  return jax.lax.dynamic_update_index_in_dim(whole, layer, i, 0)


def _on_devices(x: np.ndarray, sharding: Sharding) -> Array:
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

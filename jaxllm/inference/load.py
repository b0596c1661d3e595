"""`load_model`: a model from files of any form, its weights placed where they compute."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxllm.errors import ConfigError
from jaxllm.inference.model import Model
from jaxllm.inference.stored import DTYPES, open_model
from jaxllm.interop.tensors import Tensors, cast
from jaxllm.kernels.backends import target_from_device_kind
from jaxllm.models.build import Params, declare
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.stack import PerLayer
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.sharding import param_shardings


def load_model(
  path: str | Path, *, step: int | None = None, dtype: str | None = None, mesh: Mesh | None = None
) -> Model:
  """Loads a model: a model directory, a training run's directory (its latest checkpoint, or that of `step`),
  a Hugging Face directory, a PEFT LoRA adapter's directory, or a .gguf file.

  Args:
    dtype: of weights and computation, "float32", "bfloat16" or "float16"; None: as the weights are stored.
    mesh: places the parameters over its devices; None: the default device.

  Raises:
    CheckpointError: no such path, not a model, or damaged. ConfigError: an impossible `dtype` or `step`.
    DataError: the tokenizer is damaged, or has more tokens than the model.
  """
  if dtype is not None and dtype not in DTYPES:
    raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
  stored = open_model(path, step)
  if dtype is None:
    kept = stored.params["embedding/tokens"].dtype.name
    dtype = kept if kept in DTYPES else "float32"
  params = place_params(stored.config, cast(stored.params, jnp.dtype(dtype)), mesh)
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  compute = Compute(target=target_from_device_kind(device.platform, device.device_kind), dtype=dtype)
  return Model(stored.config, params, stored.tokenizer, compute=compute, generation=stored.generation)


def place_params(config: ModelConfig, params: Tensors, mesh: Mesh | None = None) -> Params:
  """Parameters on their devices, a `PerLayer` for each stack; no more than one layer's is held on the host.

  Raises:
    CheckpointError: a tensor turns out damaged. ConfigError: the mesh does not divide the model.
  """
  _, shapes, axes = declare(config)
  here: Sharding = SingleDeviceSharding(jax.local_devices()[0])
  shardings = {}
  if mesh is not None:
    shardings = traverse_util.flatten_dict(param_shardings(shapes, axes, mesh, AxisRules()), sep="/")
  placed: dict[str, jax.Array | PerLayer] = {}
  for path, names in traverse_util.flatten_dict(axes, sep="/").items():
    tensor, sharding = params[path], shardings.get(path, here)
    if names[:1] != ("layers",):
      placed[path] = _put(tensor.read(), sharding)
      continue
    if mesh is not None:
      sharding = NamedSharding(mesh, PartitionSpec(*sharding.spec[1:]))
    placed[path] = PerLayer(tuple(_put(tensor.part((i,)), sharding) for i in range(tensor.shape[0])))
  return traverse_util.unflatten_dict(placed, sep="/")


def _put(x: np.ndarray, sharding: Sharding) -> jax.Array:
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

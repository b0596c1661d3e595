"""`load_model`: a model from files of any form, its weights placed where they compute."""

from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxllm.base.chips import chip_of
from jaxllm.inference.model import Model
from jaxllm.interop.open import Adapters, open_model
from jaxllm.interop.several_adapters import factors, open_adapters
from jaxllm.interop.stored import DTYPES, StoredModel, check_dtype
from jaxllm.models.config import Compute
from jaxllm.models.multi_lora import Adapter


def load_model(
  path: str | Path,
  *,
  adapter: Adapters = None,
  step: int | None = None,
  dtype: str | None = None,
  mesh: Mesh | None = None,
  merge: bool = False,
) -> Model:
  """Loads a model: a model directory, a training run's directory (its latest checkpoint, or that of `step`),
  a Hugging Face directory, a PEFT LoRA or DoRA adapter's directory, or a .gguf file.

  Args:
    adapter: a PEFT adapter's directory, for the model at `path`; or several, (directory, weight) where not all of one
      is to be added.
    dtype: of weights and computation, "float32", "bfloat16" or "float16"; None: as the weights are stored.
    mesh: places the parameters over its devices; None: the default device.
    merge: adapters are merged into the weights; else they are kept apart, as weights that a tree of parameters holds.

  Raises:
    CheckpointError: no such path, not a model, or damaged. ConfigError: an impossible `dtype` or `step`.
    DataError: the tokenizer is damaged, or has more tokens than the model.
  """
  check_dtype(dtype)  # before checksums are made of many gigabytes
  return read_weights(open_model(path, adapter=adapter, step=step, merge=merge), dtype=dtype, mesh=mesh)


def load_with_adapters(
  path: str | Path,
  adapters: Mapping[str, Adapters],
  *,
  adapter: Adapters = None,
  dtype: str | None = None,
  mesh: Mesh | None = None,
) -> tuple[Model, dict[str, Adapter]]:
  """Loads a model, and others' adapters of it apart, for `jaxllm.inference.engine.Engine`.

  Args:
    adapters: directories by name, see `jaxllm.interop.several_adapters.open_adapters`. The others: see `load_model`.

  Raises:
    CheckpointError, ConfigError, DataError: as `load_model` and `open_adapters`.
  """
  check_dtype(dtype)
  stored, found = open_adapters(open_model(path, adapter=adapter, merge=False), adapters)
  model = read_weights(stored, dtype=dtype, mesh=mesh)
  return model, {name: factors(several, stored.config, mesh) for name, several in found.items()}


def read_weights(stored: StoredModel, *, dtype: str | None = None, mesh: Mesh | None = None) -> Model:
  """`load_model` of what is open already."""
  dtype = dtype or (stored.dtype if stored.dtype in DTYPES else "float32")
  device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
  compute = Compute(target=chip_of(device.platform, device.device_kind).name, dtype=dtype)
  params = stored.params(dtype, mesh, per_layer=True)
  settings = {"compute": compute, "generation": stored.generation, "source": stored.source, "vectors": stored.vectors}
  return Model(stored.config, params, stored.tokenizer, **settings)

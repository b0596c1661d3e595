"""PEFT's LoRA adapters, merged into the weights that they were trained on."""

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.directory_files import read_json
from jaxllm.interop.safetensors import read_safetensors
from jaxllm.interop.tensors import LazyTensor, Tensors

CONFIG_FILE, WEIGHTS_FILE, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


def is_adapter(directory: Path) -> bool:
  return (directory / CONFIG_FILE).is_file()


def base_of(directory: Path) -> Path:
  """The model that an adapter belongs to; a relative path counts from here, or from the adapter.

  Raises:
    CheckpointError: adapter_config.json is damaged or names no path on this machine.
  """
  name = read_json(directory / CONFIG_FILE).get("base_model_name_or_path")
  if isinstance(name, str) and name:
    for path in (Path(name).expanduser(), directory / name):
      if path.exists() and path.resolve() != directory.resolve():
        return path
  raise CheckpointError(
    f"the adapter in {directory} belongs to {name!r}, which is no path to another model here; set "
    f"base_model_name_or_path in its {CONFIG_FILE} to where that model is"
  )


def merge_adapter(directory: Path, tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
  """adapter_config.json, and a checkpoint's tensors with the adapter's products added, each when it is read (Hu
  et al., arXiv 2106.09685).

  Raises:
    ConfigError: it is not a plain LoRA.
    CheckpointError: there is no adapter, or its weights are missing, damaged, or do not fit the checkpoint.
  """
  if not is_adapter(directory):
    raise CheckpointError(f"{directory} is no adapter: an adapter's directory has an {CONFIG_FILE}")
  config = read_json(directory / CONFIG_FILE)
  kind = config.get("peft_type")
  if kind != "LORA":
    raise ConfigError(f"the adapter in {directory} is of the kind {kind!r}; only LORA can be merged into a model")
  for setting in ("use_dora", "layer_replication", "alora_invocation_tokens", "lora_bias", "use_bdlora"):
    if config.get(setting):
      raise ConfigError(f"the adapter in {directory} has {setting} = {config[setting]!r}, which cannot be merged here")
  if not (directory / WEIGHTS_FILE).is_file():
    pickle = f"only {PICKLE}, a pickle, which is never opened here" if (directory / PICKLE).is_file() else "no weights"
    raise CheckpointError(f"{directory} has {pickle}; save the adapter again as {WEIGHTS_FILE}")
  adapter = {name.removeprefix(_PREFIX): t for name, t in read_safetensors(directory / WEIGHTS_FILE).items()}
  merged = dict(tensors)
  for name, tensor in adapter.items():
    first = next((ending for ending in _PAIRS if name.endswith(ending)), None)
    if first is None:
      if any(name.endswith(second) for second in _PAIRS.values()):
        continue
      target = name.replace(".base_layer.", ".")
      _check(target in tensors and tensors[target].shape == tensor.shape, directory, name)
      merged[target] = tensor  # trained in full: modules_to_save, biases
      continue
    module = name.removesuffix(first)
    second, target = module + _PAIRS[first], f"{module}.weight"
    _check(second in adapter and target in tensors, directory, name)
    embedded = first == ".lora_embedding_A"  # V x D, as the product of B [D, r] and A [r, V] transposed
    transposed = embedded or bool(config.get("fan_in_fan_out"))
    down, up, base = tensor, adapter[second], tensors[target]
    _check(len(down.shape) == len(up.shape) == 2 and up.shape[1] == down.shape[0], directory, name)
    shape = (up.shape[0], down.shape[1])
    _check(base.shape == (shape[::-1] if transposed else shape), directory, name)
    scale = _scale(config, module, down.shape[0])
    read = functools.partial(_add, base, down, up, scale, transposed)
    merged[target] = LazyTensor(base.shape, base.dtype, read)
  return config, merged


def _add(base: LazyTensor, down: LazyTensor, up: LazyTensor, scale: float, transposed: bool) -> np.ndarray:
  change = up.read().astype(np.float32) @ down.read().astype(np.float32)
  change *= np.float32(scale)
  change += (base.read().T if transposed else base.read()).astype(np.float32)
  return (change.T if transposed else change).astype(base.dtype)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
  """What a module's product is multiplied by; `alpha_pattern` maps ends or patterns of names to their alpha."""
  alpha = config.get("lora_alpha", 8)
  for pattern, value in (config.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      alpha = value
      break
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check(fits: bool, directory: Path, name: str) -> None:
  if not fits:
    raise CheckpointError(f"the adapter in {directory} does not fit its base model: {name} changes no weight of it")

"""The model directory, the one form in which models are kept and passed around.

- config.json: {"model": the fields of ModelConfig, "version": of this layout}
- params/: the parameters (Orbax), layers stacked
- params.sha256.json: a checksum of every file in params/
- tokenizer files: what `jaxllm.data.tokenizers.load_tokenizer` reads
- generation_config.json: eos_token_id and default sampling settings, by Hugging Face's names
"""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.models.build import Params
from jaxllm.models.config import ModelConfig, RopeScaling

CONFIG_FILE, PARAMS, CHECKSUMS = "config.json", "params", "params.sha256.json"
GENERATION_FILE = "generation_config.json"
VERSION = 1


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    CheckpointError: no such file, or no object in it.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise CheckpointError(f"{path.parent} has no {path.name}") from None
  except (OSError, ValueError) as error:
    raise CheckpointError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise CheckpointError(f"{path} holds no JSON object")
  return value


def read_model_config(directory: Path) -> ModelConfig:
  """The ModelConfig under "model" in a directory's config.json (a run's has more groups beside it).

  Raises:
    CheckpointError: the file is missing or holds no such config. ConfigError: an impossible model.
  """
  file = directory / CONFIG_FILE
  fields = read_json(file).get("model")
  if not isinstance(fields, dict):
    raise CheckpointError(f'{file} has no "model" group, so {directory} is not a jaxllm model')
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  if unknown := sorted(fields.keys() - known):
    raise CheckpointError(f"{file}: model.{unknown[0]} is unknown to this version of jaxllm")
  fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
  try:
    if fields.get("rope_scaling") is not None:
      fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return ModelConfig(**fields)
  except TypeError as error:
    raise CheckpointError(f"{file}: a field of model has a wrong type ({error})") from error


def write_model(
  directory: Path, config: ModelConfig, params: Params, tokenizer: Any, generation: dict[str, Any]
) -> None:
  """Writes a model directory; the checksums last, so that a directory which has them is complete.

  Raises:
    CheckpointError: the path holds something else, or cannot be written.
  """
  from orbax.checkpoint import v1 as ocp

  if directory.exists() and not directory.is_dir():
    raise CheckpointError(f"cannot write a model to {directory}: it is a file")
  if directory.is_dir() and any(directory.iterdir()) and not (directory / PARAMS).is_dir():
    raise CheckpointError(f"{directory} has other things in it; choose an empty or new directory")
  try:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(directory / PARAMS, ignore_errors=True)
    content = {"model": dataclasses.asdict(config), "version": VERSION}
    (directory / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / GENERATION_FILE).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
      tokenizer.save(directory)
    ocp.save_pytree((directory / PARAMS).absolute(), params)
    (directory / CHECKSUMS).write_text(json.dumps(_checksums(directory / PARAMS), indent=0), encoding="utf-8")
  except OSError as error:
    raise CheckpointError(f"cannot write the model to {directory}: {error}") from error


def read_params(directory: Path, shapes: Params, shardings: Params | None = None, dtype: str | None = None) -> Params:
  """The parameters of a model directory, checked against its checksums.

  Args:
    shapes: what the model expects, as `jaxllm.models.build.declare` says.
    shardings: where each parameter goes; None: the default device.
    dtype: of the result; None: as stored.

  Raises:
    CheckpointError: parameters are missing, damaged, or another model's.
  """
  from orbax.checkpoint import v1 as ocp

  path = directory / PARAMS
  if not path.is_dir():
    raise CheckpointError(f"{directory} is not a complete model directory: it has no {PARAMS}/")
  if not (directory / CHECKSUMS).is_file():
    raise CheckpointError(f"{directory} has no {CHECKSUMS}: writing it was cut off; save the model again")
  if _checksums(path) != read_json(directory / CHECKSUMS):
    raise CheckpointError(f"the parameters in {path} are damaged: their checksums differ; copy them again")
  stored = ocp.pytree_metadata(path.absolute()).metadata
  expected, found = (
    {"/".join(k.key for k in keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (shapes, stored)
  )
  for name in sorted(expected.keys() | found.keys()):
    if expected.get(name) != found.get(name):
      raise CheckpointError(
        f"the parameters in {path} do not fit {CONFIG_FILE}: {name} has shape {found.get(name)}, "
        f"the model's has {expected.get(name)}"
      )
  if shardings is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, shapes)
  target = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, np.dtype(dtype or leaf.dtype), sharding=sharding),
    stored,
    shardings,
  )
  return ocp.load_pytree(path.absolute(), target)


def read_generation_config(directory: Path) -> dict[str, Any]:
  """generation_config.json, {} where there is none.

  Raises:
    CheckpointError: it cannot be read. ConfigError: the end-of-text tokens in it are not token ids.
  """
  if not (directory / GENERATION_FILE).is_file():
    return {}
  config = read_json(directory / GENERATION_FILE)
  ends = config.get("eos_token_id")
  if ends is not None and not all(isinstance(i, int) for i in (ends if isinstance(ends, list) else [ends])):
    raise ConfigError(f"{directory / GENERATION_FILE}: eos_token_id is {ends!r}, not a token id or a list of them")
  return config


def _checksums(directory: Path) -> dict[str, str]:
  sums = {}
  for file in sorted(p for p in directory.rglob("*") if p.is_file()):
    with file.open("rb") as data:
      sums[file.relative_to(directory).as_posix()] = hashlib.file_digest(data, "sha256").hexdigest()
  return sums

"""The model directory, the one form in which models are kept and passed around.

- config.json: {"model": the fields of ModelConfig, "version": of this layout}
- params/: the parameters by path, layers stacked, in safetensors files like those of Hugging Face: they can
  be written and read one layer at a time, by any program
- params.sha256.json: a checksum of every file in params/
- tokenizer files: what `jaxllm.data.tokenizers.load_tokenizer` reads
- generation_config.json: eos_token_id and default sampling settings, by Hugging Face's names
"""

import concurrent.futures
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from flax import traverse_util

from jaxllm.base.files import new_directory
from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.interop.safetensors import DEFAULT_SHARD_BYTES, read_sharded, write_sharded
from jaxllm.interop.tensors import Tensors
from jaxllm.models.build import declare
from jaxllm.models.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling

CONFIG_FILE, PARAMS, CHECKSUMS = "config.json", "params", "params.sha256.json"
GENERATION_FILE = "generation_config.json"
VERSION = 2


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
    for name, kind in {"rope_scaling": RopeScaling, "moe": MoEConfig, "mla": MLAConfig}.items():
      if fields.get(name) is not None:
        fields[name] = kind(**fields[name])
    return ModelConfig(**fields)
  except TypeError as error:
    raise CheckpointError(f"{file}: a field of model has a wrong type ({error})") from error


def write_model(
  directory: Path,
  config: ModelConfig,
  params: Tensors,
  tokenizer: Any,
  generation: dict[str, Any],
  max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
  """Writes a model directory, or replaces one; it appears when it is complete.

  Args:
    params: by path ("blocks/attention/query/weight"), read part by part.

  Raises:
    CheckpointError: the path holds something else, or cannot be written.
  """
  with new_directory(directory, lambda path: (path / PARAMS).is_dir() and (path / CONFIG_FILE).is_file()) as new:
    (new / PARAMS).mkdir()
    write_sharded(new / PARAMS, params, max_shard_bytes)
    (new / CHECKSUMS).write_text(json.dumps(_checksums(new / PARAMS), indent=0), encoding="utf-8")
    write_json(new / GENERATION_FILE, generation)
    if tokenizer is not None:
      tokenizer.save(new)
    write_json(new / CONFIG_FILE, {"model": dataclasses.asdict(config), "version": VERSION})


def read_model(directory: Path) -> tuple[ModelConfig, Tensors]:
  """The config and the parameters of a model directory, its files checked against their checksums.

  Raises:
    CheckpointError: parameters are missing, damaged, or another model's. ConfigError: an impossible model.
  """
  config = read_model_config(directory)
  path = directory / PARAMS
  version = read_json(directory / CONFIG_FILE).get("version")
  if version != VERSION:
    raise CheckpointError(
      f"{directory} has layout version {version!r}, this jaxllm reads {VERSION}; save it again with this version"
    )
  if not path.is_dir():
    raise CheckpointError(f"{directory} is not a complete model directory: it has no {PARAMS}/")
  if not (directory / CHECKSUMS).is_file():
    raise CheckpointError(f"{directory} has no {CHECKSUMS}: writing it was cut off; save the model again")
  if _checksums(path) != read_json(directory / CHECKSUMS):
    raise CheckpointError(f"the parameters in {path} are damaged: their checksums differ; copy them again")
  params = read_sharded(path)
  shapes = {name: leaf.shape for name, leaf in traverse_util.flatten_dict(declare(config)[1], sep="/").items()}
  for name in sorted(shapes.keys() | params.keys()):
    found = params[name].shape if name in params else None
    if shapes.get(name) != found:
      raise CheckpointError(
        f"the parameters in {path} do not fit {CONFIG_FILE}: {name} has shape {found}, "
        f"the model's has {shapes.get(name)}"
      )
  return config, params


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


def write_json(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _checksums(directory: Path) -> dict[str, str]:
  def digest(file: Path) -> str:
    with file.open("rb") as data:
      return hashlib.file_digest(data, "sha256").hexdigest()

  files = sorted(p for p in directory.rglob("*") if p.is_file())
  with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
    return dict(zip((file.relative_to(directory).as_posix() for file in files), pool.map(digest, files)))

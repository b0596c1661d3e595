"""The model directory, the one form in which models are kept and passed around.

- config.json: {"model": the fields of ModelConfig, "version": of this layout, "source": what a config.json of Hugging
  Face that it was made from said besides, see `directory_files.Source`}
- params/: the parameters by path, layers stacked, in safetensors files like those of Hugging Face: they can
  be written and read one layer at a time, by any program
- tokenizer files: what `jaxllm.data.tokenizers.load_tokenizer` reads
- generation_config.json: eos_token_id and default sampling settings, by Hugging Face's names
- modules.json and what it names: how a text's states become one vector, as sentence-transformers has it
- jaxllm_manifest.json: size and SHA-256 of each of these files, which are checked before they are used, see
  `jaxllm.base.digests`; written last. Directories that are older have params.sha256.json, of the parameters alone.
"""

import dataclasses
from pathlib import Path

from jaxllm.base import digests
from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import new_directory
from jaxllm.base.settings import from_mapping
from jaxllm.interop.directory_files import (
  CONFIG_FILE,
  GENERATION_FILE,
  READ_IF_THERE,
  read_generation_config,
  read_json,
  read_tokenizer,
  source_of,
  write_json,
)
from jaxllm.interop.safetensors import read_sharded, write_sharded
from jaxllm.interop.sentence_transformers import READ_IF_THERE as OF_VECTORS
from jaxllm.interop.sentence_transformers import read_text_vectors
from jaxllm.interop.stored import StoredModel, check_shapes
from jaxllm.models.config import ModelConfig

PARAMS, CHECKSUMS = "params", "params.sha256.json"
VERSION = 2


def read_model_config(directory: Path) -> ModelConfig:
  """The ModelConfig under "model" in a directory's config.json (a run's has more groups beside it).

  Raises:
    CheckpointError: the file is missing or holds no such config, or that of an impossible model.
  """
  file = directory / CONFIG_FILE
  fields = read_json(file).get("model")
  if not isinstance(fields, dict):
    raise CheckpointError(f'{file} has no "model" group, so {directory} is not a jaxllm model')
  try:
    return from_mapping(ModelConfig, fields, "model")
  except ConfigError as error:
    raise CheckpointError(f"{file}: {error}; it may be of another version of jaxllm") from error


def write_model_directory(directory: Path, model: StoredModel, max_shard_bytes: int) -> None:
  """Writes a model directory, or replaces one; it appears when it is complete.

  Raises:
    CheckpointError: the path holds something else, or cannot be written.
  """
  with new_directory(directory, lambda path: (path / PARAMS).is_dir() and (path / CONFIG_FILE).is_file()) as new:
    (new / PARAMS).mkdir()
    write_sharded(new / PARAMS, model.tensors, max_shard_bytes)
    write_json(new / GENERATION_FILE, model.generation)
    if model.tokenizer is not None:
      model.tokenizer.save(new)
    if model.vectors is not None:
      model.vectors.save(new)
    source = {"source": model.source} if model.source else {}
    write_json(new / CONFIG_FILE, {"model": dataclasses.asdict(model.config), "version": VERSION} | source)
    digests.seal(new)


def open_model_directory(directory: Path) -> StoredModel:
  """The model in a model directory, its files checked against their checksums.

  Raises:
    CheckpointError: the config or parameters are missing, damaged, or another model's. DataError: the tokenizer is
      damaged.
  """
  sealed = digests.check(directory, (*READ_IF_THERE, *OF_VECTORS, f"{PARAMS}/*"))
  config = read_model_config(directory)
  path = directory / PARAMS
  version = read_json(directory / CONFIG_FILE).get("version")
  if version != VERSION:
    raise CheckpointError(
      f"{directory} has layout version {version!r}, this jaxllm reads {VERSION}; save it again with this version"
    )
  if not path.is_dir():
    raise CheckpointError(f"{directory} is not a complete model directory: it has no {PARAMS}/")
  if not sealed and (directory / CHECKSUMS).is_file() and _checksums(path) != read_json(directory / CHECKSUMS):
    raise CheckpointError(f"the parameters in {path} are damaged: their checksums differ; copy them again")
  tensors = read_sharded(path)
  check_shapes(config, tensors, path)
  tokenizer, generation = read_tokenizer(directory), read_generation_config(directory)
  vectors = read_text_vectors(directory)
  source = source_of(read_json(directory / CONFIG_FILE), directory / CONFIG_FILE)
  return StoredModel(config, tensors, tokenizer, generation, directory, "jaxllm", source=source, vectors=vectors)


def _checksums(directory: Path) -> dict[str, str]:
  return {name: each["sha256"] for name, each in digests.digests(directory, digests.files_in(directory)).items()}

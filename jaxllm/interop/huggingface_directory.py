"""Hugging Face model directories: config.json, weights, generation_config.json, tokenizer files."""

import collections
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.base.errors import ConfigError, shown
from jaxllm.base.files import new_directory
from jaxllm.data.tokenizers import as_huggingface
from jaxllm.interop.bitsandbytes import is_bitsandbytes, kept, turned, unpacked
from jaxllm.interop.block_scaled import dequantized, is_block_scaled
from jaxllm.interop.directory_files import (
  CONFIG_FILE,
  GENERATION_FILE,
  as_transformers,
  generation_settings,
  read_generation_config,
  read_json,
  read_tokenizer,
  settings_in_config,
  source_of,
  write_json,
)
from jaxllm.interop.families import FAMILIES, READ_AS
from jaxllm.interop.huggingface import (
  config_from_huggingface,
  config_to_huggingface,
  family_of,
  from_huggingface,
  to_huggingface,
)
from jaxllm.interop.huggingface_keys import remarks
from jaxllm.interop.safetensors import read_sharded, write_sharded
from jaxllm.interop.sentence_transformers import read_text_vectors
from jaxllm.interop.stored import StoredModel
from jaxllm.interop.tensors import Tensors
from jaxllm.models.config import ModelConfig

log = logging.getLogger("jaxllm")

SPECIAL_IDS = {"bos_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}  # a tokenizer's
# Where several families can express a model, it is written as the first of these: what most programs read.
FIRST = ("llama", "mistral", "qwen2", "qwen3")


def read_huggingface(directory: Path) -> tuple[dict[str, Any], Tensors]:
  """The content of config.json, and the tensors by name, which are not read yet.

  Raises:
    CheckpointError: there is no config.json or no weights, or they are damaged.
    ConfigError: the weights are quantized, and not by bitsandbytes or with scales of blocks.
  """
  config = read_json(directory / CONFIG_FILE)
  method = config.get("quantization_config")
  if method and is_block_scaled(method):
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return plain, dequantized(method, read_sharded(directory))
  if method and not is_bitsandbytes(method):
    name = method.get("quant_method") if isinstance(method, dict) else method
    raise ConfigError(
      f"the weights in {directory} are quantized ({shown(name)}); use the model that they were made from"
    )
  return config, read_sharded(directory)


def open_huggingface(directory: Path) -> StoredModel:
  """The model in a directory that `save_pretrained` wrote.

  Raises:
    CheckpointError, ConfigError: see `read_huggingface` and `from_huggingface`. DataError: the tokenizer is damaged.
  """
  hf, tensors = read_huggingface(directory)
  method = hf.get("quantization_config")
  if method:
    tensors, packed = unpacked(method, tensors)
    c, family = config_from_huggingface(hf), hf["model_type"]
    config, params = from_huggingface(hf, turned(tensors, packed, c, family))
    params = kept(params, packed, config, family)
  else:
    config, params = from_huggingface(hf, tensors)
  if (directory / GENERATION_FILE).is_file():
    generation = read_generation_config(directory)
  else:
    generation = generation_settings(settings_in_config(hf), directory / CONFIG_FILE)
  generation = as_transformers(generation, config.architecture == "encoder_decoder")
  for line in remarks(hf):
    log.warning("%s: %s", directory, line)
  source = source_of(hf, directory / CONFIG_FILE)
  tokenizer, vectors = read_tokenizer(directory), read_text_vectors(directory)
  return StoredModel(config, params, tokenizer, generation, directory, "hf", source=source, vectors=vectors)


def write_huggingface(directory: Path, model: StoredModel, family: str | None, max_shard_bytes: int) -> None:
  """Writes a directory that `transformers` loads; it appears when it is complete.

  Args:
    family: the `model_type` to write; None: that which the model was read as, or else the first that can express it.

  Raises:
    ConfigError: no family, or not this one, can express the model.
    CheckpointError: the path is not free, or cannot be written.
  """
  hf, tensors = as_checkpoint(model, family)
  tokenizer = None if model.tokenizer is None else as_huggingface(model.tokenizer)
  sizes: collections.Counter[str] = collections.Counter()
  for tensor in tensors.values():
    sizes[tensor.dtype.name] += math.prod(tensor.shape)
  special = {name: _special_id(name, hf, model, getattr(tokenizer, own, None)) for name, own in SPECIAL_IDS.items()}
  with new_directory(directory) as new:
    write_sharded(new, tensors, max_shard_bytes)
    if tokenizer is not None:
      tokenizer.save(new)
    if model.vectors is not None:
      model.vectors.save(new)
    start = {"decoder_start_token_id": model.config.decoder_start_id}
    known = {name: i for name, i in special.items() if i is not None}
    known |= start if model.config.architecture == "encoder_decoder" else {}
    if model.config.architecture != "encoder":
      write_json(new / GENERATION_FILE, known | model.generation)
    write_json(new / CONFIG_FILE, hf | special | {"torch_dtype": sizes.most_common(1)[0][0]})


def families_of(config: ModelConfig) -> tuple[str, ...]:
  """The families that can express a model, those first that most programs read."""

  def can(name: str) -> bool:
    try:
      config_to_huggingface(config, name)
    except ConfigError:
      return False
    return True

  return tuple(filter(can, dict.fromkeys((*FIRST, *FAMILIES))))


def _special_id(name: str, hf: Mapping[str, Any], model: StoredModel, own: int | None) -> int | list[int] | None:
  """What config.json says of a special token: a pad that decides where positions begin above all; what the source said
  unless the settings of generation or the vocabulary have another; and the tokenizer's where all are silent."""
  said, source = model.generation.get(name), model.source.get(name)
  kept = said is None or source in (said if isinstance(said, list) else [said])
  each = source if isinstance(source, list) else [source]
  source = source if kept and all(i is not None and 0 <= i < model.config.vocab_size for i in each) else None
  return next((found for found in (hf.get(name), source, said, own) if found is not None), None)


def family_to_write(source: str | None) -> str | None:
  """The family that a model read as this `model_type` is written as; None: there is none."""
  own = family_of({"model_type": source}).name if source in {*FAMILIES, *READ_AS} else None
  return f"{own}_text" if f"{own}_text" in FAMILIES else own  # of a file that has more than a language model


def as_checkpoint(model: StoredModel, family: str | None = None) -> tuple[dict[str, Any], Tensors]:
  """`to_huggingface` as a family, or as that which the model was read as, or else the first that can express it; with
  the names that the source had for as many labels as there are.

  Raises:
    ConfigError: none can.
  """
  if model.config.adapter is not None:
    raise ConfigError("no Hugging Face family has what model.adapter puts into blocks; keep it as a model directory")
  own = family_to_write(model.source.get("model_type"))
  reasons: list[str] = []
  for name in dict.fromkeys((family,) if family else (*((own,) if own else ()), *FIRST, *FAMILIES)):
    try:
      hf, tensors = to_huggingface(model.config, name, model.tensors)
    except ConfigError as error:
      if family:
        raise
      reasons.append(str(error))
      continue
    if reasons and own:
      log.warning("written as %s, because %s", name, reasons[0])
    labels = {key: model.source[key] for key in ("id2label", "label2id", "problem_type") if key in model.source}
    return hf | (labels if len(labels.get("id2label", {})) == len(hf.get("id2label", {})) else {}), tensors
  raise ConfigError(f"no Hugging Face family can express this model: {reasons[0]}")

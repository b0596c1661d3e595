"""Models in files, of every form: opened without reading their weights, and written from them."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from jaxllm.base.files import local_path
from jaxllm.data.tokenizers import Tokenizer, as_huggingface, find_tokenizer, load_tokenizer
from jaxllm.errors import CheckpointError, ConfigError, DataError
from jaxllm.interop import huggingface_directory, model_directory, peft
from jaxllm.interop.huggingface import from_huggingface
from jaxllm.interop.safetensors import DEFAULT_SHARD_BYTES
from jaxllm.interop.tensors import LazyTensor, Tensors, cast
from jaxllm.models.config import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")
Format = Literal["jaxllm", "hf", "gguf"]
FORMATS = ("jaxllm", "hf", "gguf")


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """A model whose weights are read when they are asked for.

  params: by path ("blocks/attention/query/weight"), layers stacked. generation: eos_token_id and default
  sampling settings, by Hugging Face's names.
  """

  config: ModelConfig
  params: Tensors
  tokenizer: Tokenizer | None
  generation: dict[str, Any]


def open_model(path: str | Path, step: int | None = None) -> StoredModel:
  """Opens a model directory, a training run's (its latest checkpoint, or that of `step`), a Hugging Face
  model's, a PEFT LoRA adapter's (its base is where adapter_config.json says), or a .gguf file.

  Names, shapes and types of all weights are checked; so are the checksums of a model directory.

  Raises:
    CheckpointError: no such path, not a model, or damaged. ConfigError: a URL, a model that cannot be expressed,
      or a `step` of what has none. DataError: the tokenizer is damaged.
  """
  path = local_path(path)
  if not path.exists():
    raise CheckpointError(f"no model at {path}: there is no such path")
  if (path / "checkpoints").is_dir():
    return _open_run(path, step)
  if step is not None:
    raise ConfigError(f"{path} is not a training run and has no steps; leave --step out")
  if path.is_file() and path.suffix == ".gguf":
    return _open_gguf(path)
  if path.is_dir() and peft.is_adapter(path):
    return _open_adapter(path)
  if not (path / model_directory.CONFIG_FILE).is_file():
    raise CheckpointError(
      f"{path} is not a model: a model, Hugging Face or training run's directory has a {model_directory.CONFIG_FILE}, "
      f"an adapter's a {peft.CONFIG_FILE}, and a file ends in .gguf"
    )
  if "model_type" in model_directory.read_json(path / model_directory.CONFIG_FILE):
    config, params = from_huggingface(*huggingface_directory.read_huggingface(path))
    return StoredModel(config, params, tokenizer_in(path), huggingface_directory.read_huggingface_generation(path))
  config, params = model_directory.read_model(path)
  return StoredModel(config, params, tokenizer_in(path), model_directory.read_generation_config(path))


def write_model(
  path: Path,
  model: StoredModel,
  format: Format = "jaxllm",
  *,
  dtype: str | None = None,
  quantize: str | None = None,
  family: str | None = None,
  max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
  """Writes a model directory, a Hugging Face model's ("hf") or a GGUF file, a tensor at a time.

  It appears under its name when it is complete.

  Args:
    dtype: of the weights, "float32", "bfloat16" or "float16"; None: as they are.
    quantize: "q8_0", "q4_0", "q4_1", …: a GGUF file's type of the matrices.
    family: the Hugging Face `model_type` to write; None: the first that can express the model.

  Raises:
    ConfigError: an impossible setting, a URL, or no family can express the model.
    CheckpointError: the path is not free or cannot be written, or the weights turn out damaged.
  """
  path = local_path(path)
  if format not in FORMATS:
    raise ConfigError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
  if dtype is not None and dtype not in DTYPES:
    raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
  if quantize is not None and format != "gguf":
    raise ConfigError(f"only a gguf file can be written as {quantize}; choose the format gguf, or leave quantize out")
  if family is not None and format == "jaxllm":
    raise ConfigError("a model directory has no family; choose the format hf or gguf, or leave family out")
  if model.tokenizer is not None and model.tokenizer.vocab_size > model.config.vocab_size:
    raise DataError("the tokenizer has more tokens than the model; it belongs to another model")
  params = model.params if dtype is None else cast(model.params, jnp.dtype(dtype))
  tokenizer = model.tokenizer
  if format == "jaxllm":
    model_directory.write_model(path, model.config, params, tokenizer, model.generation, max_shard_bytes)
  elif format == "hf":
    huggingface_directory.write_huggingface(
      path,
      model.config,
      params,
      None if tokenizer is None else as_huggingface(tokenizer),
      model.generation,
      family,
      max_shard_bytes,
    )
  else:
    _write_gguf(path, dataclasses.replace(model, params=params), quantize, family)


def _write_gguf(path: Path, model: StoredModel, quantize: str | None, family: str | None) -> None:
  from jaxllm.interop.gguf import write_gguf

  if path.exists():
    raise CheckpointError(f"{path} is there already; choose another name, or remove it")
  hf, tensors = huggingface_directory.as_huggingface(model.config, model.params, family)
  types = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
  stored = model.params["embedding/tokens"].dtype.name
  template = None if model.tokenizer is None else model.tokenizer.chat_templates.get("default")
  write_gguf(
    path,
    hf,
    tensors,
    model.tokenizer,
    dtype=quantize or types.get(stored, "f32"),
    chat_template=template,
    generation=model.generation,
  )


def tokenizer_in(directory: Path) -> Tokenizer | None:
  """The tokenizer in a directory; None where there are no files of one (a model of bare token ids)."""
  return None if find_tokenizer(directory) is None else load_tokenizer(directory)


def _open_run(directory: Path, step: int | None) -> StoredModel:
  from jaxllm.storage.reading import open_params

  config = model_directory.read_model_config(directory)
  params = {name: LazyTensor(*array) for name, array in open_params(directory, step).items()}
  generation = model_directory.read_generation_config(directory)
  return StoredModel(config, params, tokenizer_in(directory / "tokenizer"), generation)


def _open_adapter(directory: Path) -> StoredModel:
  base_path = peft.base_of(directory)
  base = open_model(base_path)
  if (base_path / model_directory.CONFIG_FILE).is_file() and "model_type" in model_directory.read_json(
    base_path / model_directory.CONFIG_FILE
  ):
    hf, tensors = huggingface_directory.read_huggingface(base_path)
  else:
    hf, tensors = huggingface_directory.as_huggingface(base.config, base.params)
  config, params = from_huggingface(hf, peft.merge_adapter(directory, tensors))
  return dataclasses.replace(base, config=config, params=params, tokenizer=tokenizer_in(directory) or base.tokenizer)


def _open_gguf(path: Path) -> StoredModel:
  from jaxllm.interop.gguf import read_gguf

  file = read_gguf(path)
  config, params = from_huggingface(file.config, file.tensors)
  return StoredModel(config, params, file.tokenizer(), file.generation)

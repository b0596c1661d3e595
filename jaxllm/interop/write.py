"""`write_model`: a model written in any of the forms that others read."""

import os
from pathlib import Path
from typing import Literal, get_args

from jaxllm.base.errors import CheckpointError, ConfigError, DataError
from jaxllm.base.files import local_path
from jaxllm.interop.gguf import write_gguf
from jaxllm.interop.huggingface_directory import as_checkpoint, write_huggingface
from jaxllm.interop.model_directory import write_model_directory
from jaxllm.interop.safetensors import DEFAULT_SHARD_BYTES
from jaxllm.interop.stored import StoredModel

Format = Literal["jaxllm", "hf", "gguf"]


def write_model(
  model: StoredModel,
  path: str | Path,
  *,
  format: Format = "jaxllm",
  dtype: str | None = None,
  quantize: str | None = None,
  family: str | None = None,
  max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
  """Writes a model directory, a Hugging Face model's ("hf") or a GGUF file, a tensor at a time, adapters merged.

  It appears under its name when it is complete.

  Args:
    dtype: of the weights, "float32", "bfloat16" or "float16"; None: as they are.
    quantize: "q8_0", "q4_0", "q4_1", …: a GGUF file's type of the matrices.
    family: the Hugging Face `model_type` to write; None: that which the model was read as (not "gguf"), or else the
      first that can express it.

  Raises:
    ConfigError: an impossible setting, a URL, or no family can express the model.
    CheckpointError: the path is not free or cannot be written, or the weights turn out damaged.
    DataError: the tokenizer is another model's, or the format has no such tokenizer.
  """
  path = local_path(path)
  if format not in get_args(Format):
    raise ConfigError(f"format is {format!r}; choose one of {', '.join(get_args(Format))}")
  if quantize is not None and format != "gguf":
    raise ConfigError(f"only a gguf file can be written as {quantize}; choose the format gguf, or leave quantize out")
  if family is not None and format == "jaxllm":
    raise ConfigError("a model directory has no family; choose the format hf or gguf, or leave family out")
  if model.tokenizer is not None and model.tokenizer.vocab_size > model.config.vocab_size:
    raise DataError("the tokenizer has more tokens than the model; it belongs to another model")
  model = model.merged(dtype)
  if format == "jaxllm":
    write_model_directory(path, model, max_shard_bytes)
  elif format == "hf":
    write_huggingface(path, model, family, max_shard_bytes)
  elif os.path.lexists(path):  # a link to nothing too
    raise CheckpointError(f"{path} is there already; choose another name, or remove it")
  else:
    hf, tensors = as_checkpoint(model, family)
    kind = quantize or {"bfloat16": "bf16", "float16": "f16"}.get(model.dtype, "f32")
    write_gguf(path, hf, tensors, model.tokenizer, dtype=kind, generation=model.generation, vectors=model.vectors)

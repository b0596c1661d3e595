"""Writes a Hugging Face checkpoint as a GGUF file for llama.cpp and Ollama."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import new_file
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.interop.gguf.architectures import WRITABLE
from jaxllm.interop.gguf.config import as_gguf
from jaxllm.interop.gguf.encoders import reduced
from jaxllm.interop.gguf.header import ALIGNMENT, aligned, encode_header, nbytes_of
from jaxllm.interop.gguf.pooling import RANK, pooling_type
from jaxllm.interop.gguf.tokenizer_write import tokenizer_metadata
from jaxllm.interop.sentence_transformers import TextVectors
from jaxllm.interop.tensors import LazyTensor, Tensors

log = logging.getLogger("jaxllm")
Dtype = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32, "mxfp4": 38}
# What stays float32: norms, routers, biases (of all experts too), what only a row is taken of, a classifier's head.
_FLOAT32 = (
  *("_norm.weight", ".bias", "ffn_gate_inp.weight", "attn_rel_b.weight", "position_embd.weight"),
  *("token_types.weight", "cls.weight", "cls.output.weight"),
)
_QUANTIZED_BLOCK = 32  # elements, of every type here
_AT_ONCE = 1 << 20  # elements that are quantized in one go


def write_gguf(
  path: str | Path,
  hf_config: Mapping[str, Any],
  tensors: Tensors,
  tokenizer: Tokenizer | None,
  *,
  dtype: Dtype = "f32",
  generation: Mapping[str, Any] | None = None,
  vectors: TextVectors | None = None,
) -> None:
  """Writes a checkpoint as one GGUF file, tensor by tensor; a file that is there already is replaced at the end.

  Which tensor gets which type follows llama.cpp: vectors, norms and routers stay float32; in a file of four or five
  bits the output matrix (the embedding, where they are tied) gets 8; rows that are no whole blocks get float16.
  mxfp4 is for the matrices of experts, as gpt-oss has them; the others are bfloat16 then.
  Quantization rounds to nearest, as `gguf.quants.quantize` does.

  Args:
    tensors: by Hugging Face's names.
    tokenizer: None: prompts will have to be token ids.
    dtype: of the matrices.
    generation: of generation_config.json; see `GgufCheckpoint.generation`.
    vectors: how states become one vector of a text; None: of an encoder their mean.

  Raises:
    ConfigError: an unknown `dtype`, or a model that llama.cpp does not know or would compute differently.
    DataError: a tokenizer that llama.cpp cannot follow.
    CheckpointError: tensors that do not fit the config, or the file cannot be written; then nothing is left.
  """
  if dtype not in get_args(Dtype):
    raise ConfigError(f"GGUF files can be written as {', '.join(get_args(Dtype))}, not {dtype!r}")
  family = hf_config.get("model_type")
  if family not in WRITABLE:
    raise ConfigError(f"a {family} model cannot be written as GGUF; those that can are {', '.join(WRITABLE)}")
  architecture, metadata, tensors = as_gguf(*reduced(hf_config, tensors))
  if dtype == "mxfp4" and not any(_is_experts(name) for name in tensors):
    raise ConfigError("mxfp4 is a type of experts' matrices, and the model has none; choose another one")
  if f"{architecture.name}.classifier.output_labels" in metadata:
    metadata[f"{architecture.name}.pooling_type"] = RANK
  elif vectors or metadata.get(f"{architecture.name}.attention.causal") is False:
    metadata[f"{architecture.name}.pooling_type"] = pooling_type(vectors or TextVectors(steps=(None,)))
  metadata |= {"general.file_type": _FILE_TYPES[dtype], "general.quantization_version": 2}
  if tokenizer is None:
    metadata["tokenizer.ggml.model"] = "none"
  else:
    vocab_size = tensors["token_embd.weight"].shape[0]
    metadata |= tokenizer_metadata(tokenizer, vocab_size, generation or {})
  tied = "output.weight" not in tensors
  kinds = {name: _type_of(name, tensor.shape, dtype.upper(), tied) for name, tensor in tensors.items()}
  others = [name for name, kind in kinds.items() if kind == "F16" and dtype != "f16"]
  if others:
    log.warning(
      "GGUF: rows of %d matrices are no whole blocks of %d numbers, so these stay float16: %s%s",
      *(len(others), _QUANTIZED_BLOCK, ", ".join(others[:3]), ", …" if len(others) > 3 else ""),
    )
  infos, offset = [], 0
  for name, tensor in tensors.items():
    infos.append((name, kinds[name], tensor.shape, offset))
    offset = aligned(offset + nbytes_of(kinds[name], tensor.shape), ALIGNMENT)
  with new_file(Path(path).expanduser()) as file:
    file.write(encode_header(metadata, infos))
    for name, tensor in tensors.items():
      _write_tensor(file, name, tensor, kinds[name])


def _is_experts(name: str) -> bool:
  return name.endswith("_exps.weight")


def _type_of(name: str, shape: tuple[int, ...], wanted: str, tied: bool) -> str:
  """The type of a tensor in a file of type `wanted`."""
  if len(shape) < 2 or name.endswith(_FLOAT32):
    return "F32"
  if wanted == "MXFP4" and not _is_experts(name):
    return "BF16"
  if wanted in ("F32", "F16", "BF16"):
    return wanted
  if shape[-1] % _QUANTIZED_BLOCK:
    return "F16"
  is_output = name == "output.weight" or (tied and name == "token_embd.weight")
  return "Q8_0" if is_output else wanted


def _write_tensor(file: BinaryIO, name: str, tensor: LazyTensor, kind: str) -> None:
  import gguf

  for array in tensor.parts():  # one expert after the other
    if array.shape != tensor.shape[tensor.stacked :]:
      raise CheckpointError(f"the tensor {name} has shape {array.shape}, not the {tensor.shape} that was announced")
    rows = array.reshape(-1, array.shape[-1])
    step = max(1, _AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
      some = np.ascontiguousarray(rows[start : start + step], np.float32)
      with np.errstate(over="ignore"):
        data = gguf.quants.quantize(some, gguf.GGMLQuantizationType[kind])
      if kind == "F16" and np.isinf(data).any() and not np.isinf(some).any():
        raise CheckpointError(f"the tensor {name} has values beyond float16; write bf16 or f32")
      file.write(data.tobytes())
  file.write(bytes(-file.tell() % ALIGNMENT))

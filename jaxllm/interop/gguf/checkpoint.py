"""A GGUF file seen as a Hugging Face checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.base.errors import CheckpointError, DataError
from jaxllm.base.files import scratch_directory
from jaxllm.base.os_errors import file_errors
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.interop.gguf.architectures import BY_MODEL_TYPE
from jaxllm.interop.gguf.config import read_config
from jaxllm.interop.gguf.header import TensorInfo, nbytes_of, read_headers
from jaxllm.interop.gguf.pooling import text_vectors
from jaxllm.interop.gguf.tensors import read_tensors
from jaxllm.interop.gguf.tokenizer import ROLES, special_ids, tokenizer_files
from jaxllm.interop.huggingface import config_from_huggingface
from jaxllm.interop.sentence_transformers import TextVectors
from jaxllm.interop.tensors import Index, LazyTensor, Tensors, from_parts

QUANTIZED = (
  *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4"),
  *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)
# As stored; the quantized types become float32.
_PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_AT_ONCE = 1 << 20  # elements that are dequantized in one go


@dataclasses.dataclass(frozen=True)
class GgufCheckpoint:
  """config: as in config.json. tensors: by Hugging Face's names. metadata: everything that the file says."""

  config: dict[str, Any]
  tensors: Tensors
  metadata: dict[str, Any]

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer that is written out in the metadata; None if there is none.

    Raises:
      CheckpointError: its kind is unknown, or it makes no sense.
    """
    files = tokenizer_files(self.metadata)
    if files is None:
      return None
    with scratch_directory() as directory:
      for name, data in files.items():
        (directory / name).write_bytes(data)
      try:
        return load_tokenizer(directory)
      except DataError as error:
        raise CheckpointError("the GGUF file's metadata make no tokenizer: its merges or pieces are damaged") from error

  @property
  def vectors(self) -> TextVectors | None:
    """How states become one vector of a text; None: the file does not say."""
    width = config_from_huggingface(self.config).embed_dim
    return text_vectors(self.metadata, self.metadata["general.architecture"], width)

  @property
  def generation(self) -> dict[str, Any]:
    """generation_config.json: bos_token_id, eos_token_id (a list), …; and add_bos_token, add_eos_token."""
    known = {f"{role}_token_id" for role in ROLES} | {"add_bos_token", "add_eos_token"}
    return {key: value for key, value in special_ids(self.metadata).items() if key in known}


def read_gguf(path: str | Path) -> GgufCheckpoint:
  """Reads a GGUF file's header, and of a split model all of its files' (`path` is the first); tensors are read
  and dequantized one by one, when asked for.

  Raises:
    CheckpointError: the file cannot be read, is damaged, malicious, or of an architecture unknown here.
  """
  header = read_headers(Path(path).expanduser())
  stored = {name: _lazy(name, info) for name, info in header.tensors.items()}
  config = read_config(header.metadata, stored)
  tensors = read_tensors(config, BY_MODEL_TYPE[config["model_type"]], stored)
  return GgufCheckpoint(config, tensors, header.metadata)


def _lazy(name: str, info: TensorInfo) -> LazyTensor:
  if info.type not in _PLAIN and info.type not in QUANTIZED:
    raise CheckpointError(f"{info.path}: the tensor {name} has the type {info.type}, which cannot be read here")
  dtype = _PLAIN.get(info.type, np.dtype("float32"))
  if len(info.shape) < 3:
    return LazyTensor(info.shape, dtype, lambda: _read(name, info))
  return from_parts(info.shape, dtype, 1, lambda index: _read(name, _slice(info, index)))  # of all experts


def _slice(info: TensorInfo, index: Index) -> TensorInfo:
  """Where one of a stack lies."""
  nbytes = info.nbytes // info.shape[0]
  return dataclasses.replace(info, shape=info.shape[1:], start=info.start + index[0] * nbytes, nbytes=nbytes)


def _read(name: str, info: TensorInfo) -> np.ndarray:
  import gguf

  plain = _PLAIN.get(info.type)
  out = np.empty(info.shape, plain or np.float32)
  rows = out.reshape(-1, info.shape[-1])
  step = max(1, _AT_ONCE // rows.shape[1])
  with file_errors(info.path), info.path.open("rb") as file:
    file.seek(info.start)
    for start in range(0, len(rows), step):
      some = rows[start : start + step]
      data = np.fromfile(file, np.uint8, nbytes_of(info.type, some.shape))
      if data.size < nbytes_of(info.type, some.shape):
        raise CheckpointError(f"{info.path} ends within the tensor {name}; download or convert it again")
      if plain:
        some[:] = data.view(plain).reshape(some.shape)
      else:
        kind = gguf.GGMLQuantizationType[info.type]
        some[:] = gguf.quants.dequantize(data.reshape(len(some), -1), kind)
  return out

"""safetensors files: https://github.com/huggingface/safetensors, "Format".

Eight bytes (the header's length N, little-endian), N bytes of JSON, then the tensors' bytes one after the
other. Headers come from strangers, so all of one is checked before any of it is believed. Tensors are read
at their place in the file, which is never mapped or read whole.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import ml_dtypes
import numpy as np

from jaxllm.base.errors import CheckpointError, shown
from jaxllm.base.files import regular
from jaxllm.base.os_errors import file_errors
from jaxllm.base.strangers import declared, parse_json, read_json
from jaxllm.interop.pickled import read_pickled
from jaxllm.interop.tensors import Index, LazyTensor, Tensors, is_possible, read_bytes

DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U64": np.dtype(np.uint64),
  "U32": np.dtype(np.uint32),
  "U16": np.dtype(np.uint16),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# 100,000 tensors take about 15 MB. JSON can grow twentyfold in memory, so the cap also bounds that.
MAX_HEADER = 25_000_000
DEFAULT_SHARD_BYTES = 5 * 10**9


class _Index(TypedDict, total=False):
  """model.safetensors.index.json, pytorch_model.bin.index.json."""

  weight_map: dict[str, str]


def read_safetensors(path: Path) -> Tensors:
  """The tensors of one file, in the order of their bytes; only the header is read.

  Raises:
    CheckpointError: the file is missing, cut short, or its header is not one; reading a tensor raises it too.
  """
  with file_errors(path), regular(path).open("rb") as file:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise _damaged(path, f"its header should take {length} bytes of a file of {size}; copy it again")
    if length > MAX_HEADER:
      raise _damaged(path, f"its header takes {length} bytes, which is over the limit of {MAX_HEADER}")
    text = file.read(length)
  header = parse_json(text, f"the header of {path}")
  if not isinstance(header, dict):
    raise _damaged(path, "its header is not a JSON object")
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise _damaged(path, "its __metadata__ does not map names to text")
  entries = sorted((_entry(path, name, entry) for name, entry in header.items()), key=lambda e: (e[3], e[4]))
  data, end = 8 + length, 0
  tensors = {}
  for name, dtype, shape, start, stop in entries:
    if start != end:
      raise _damaged(path, f"the tensor {name} starts at byte {start}, where the one before it ends at {end}")
    end = stop
    tensors[name] = _tensor(path, name, dtype, shape, data + start)
  if data + end != size:
    raise _damaged(path, f"its tensors end at byte {data + end} of a file of {size}; copy it again")
  return tensors


FORMS = (
  (SINGLE, INDEX, ".safetensors", read_safetensors),
  ("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin", read_pickled),
)


def read_sharded(directory: Path) -> Tensors:
  """The tensors of a directory: model.safetensors, or all of the shards that model.safetensors.index.json names; else
  pytorch_model.bin, or those of pytorch_model.bin.index.json.

  The first of these counts, as in transformers.

  Raises:
    CheckpointError: there are none, a shard is missing or lacks a tensor, or see `read_safetensors`, `read_pickled`.
  """
  for single, index, ending, read in FORMS:
    if (directory / single).is_file():
      return read(directory / single)
    if (directory / index).is_file():
      return _of_index(directory, index, ending, read)
  names = ", ".join(name for form in FORMS for name in form[:2])
  raise CheckpointError(f"{directory} has no weights: there is none of {names}")


def _of_index(directory: Path, file: str, ending: str, read: Callable[[Path], Tensors]) -> Tensors:
  index = declared(_Index, read_json(directory / file, MAX_HEADER), str(directory / file), CheckpointError)
  places = index.get("weight_map")
  if places is None:
    raise CheckpointError(f"cannot read {directory / file}: it has no weight_map of names to files")
  shards = dict.fromkeys(places.values())
  for shard in shards:
    if Path(shard).name != shard or "\\" in shard or not shard.endswith(ending) or not shard.isprintable():
      raise CheckpointError(f"{directory / file} names {shown(shard)}, which is not a {ending} file beside it")
    if not (directory / shard).is_file():
      raise CheckpointError(f"{directory} lacks the shard {shard}, which {file} names; copy it again")
  tensors = {shard: read(directory / shard) for shard in shards}
  for name, shard in places.items():
    if name not in tensors[shard]:
      raise CheckpointError(f"{directory / shard} lacks the tensor {name}, which {file} places there; copy it again")
  others = {name: tensor for shard in shards for name, tensor in tensors[shard].items() if name not in places}
  return {name: tensors[shard][name] for name, shard in places.items()} | others


def write_sharded(directory: Path, tensors: Tensors, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
  """Writes what `read_sharded` reads, one part of a tensor at a time, as `save_pretrained` names the files.

  Raises:
    OSError: the disk is full, or the directory not writable; some files may be written.
  """
  shards: list[list[str]] = [[]]
  size = 0
  for name, tensor in tensors.items():
    if shards[-1] and size + _num_bytes(tensor) > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += _num_bytes(tensor)
  if len(shards) == 1:
    write_safetensors(directory / SINGLE, tensors)
    return
  weight_map: dict[str, str] = {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    write_safetensors(directory / file, {name: tensors[name] for name in names})
    weight_map |= dict.fromkeys(names, file)
  index = {"metadata": {"total_size": sum(map(_num_bytes, tensors.values()))}, "weight_map": weight_map}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Tensors) -> None:
  """Writes one file; raises OSError."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + _num_bytes(tensor)
    header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb", buffering=0) as file:
    _write_all(file, len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
      for part in tensor.parts():
        _write_all(file, np.ascontiguousarray(part, tensor.dtype).reshape(-1).view(np.uint8).data)
    os.fsync(file.fileno())


def _entry(path: Path, name: str, entry: Any) -> tuple[str, np.dtype, tuple[int, ...], int, int]:
  """(name, dtype, shape, first byte, last byte + 1) of a tensor in a header, each alone checked."""
  if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
    raise _damaged(path, f"its entry of {shown(name)} is not a dtype, a shape and data_offsets")
  if not name.isprintable():  # names come to stand in one-line messages
    raise _damaged(path, f"it names a tensor {shown(name)}")
  kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise _damaged(path, f"the tensor {shown(name)} has the type {shown(kind)}; those known are {', '.join(DTYPES)}")
  if not (_are_sizes(shape) and is_possible(shape, DTYPES[kind]) and _are_sizes(offsets) and len(offsets) == 2):
    raise _damaged(path, f"the tensor {shown(name)} has no possible shape or place")
  start, stop = offsets
  if stop - start != math.prod(shape) * DTYPES[kind].itemsize:
    raise _damaged(
      path, f"the tensor {shown(name)} of shape {shape} and type {kind} does not take {stop - start} bytes"
    )
  return name, DTYPES[kind], tuple(shape), start, stop


def _are_sizes(value: Any) -> bool:
  return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _tensor(path: Path, name: str, dtype: np.dtype, shape: tuple[int, ...], start: int) -> LazyTensor:
  def read_part(index: Index) -> np.ndarray:
    rest = shape[len(index) :]
    place = 0
    for i, n in zip(index, shape):
      place = place * n + i
    size = math.prod(rest) * dtype.itemsize
    return read_bytes(path, start + place * size, size, name).view(dtype).reshape(rest)

  # A stack of matrices is best read one by one.
  return LazyTensor(shape, dtype, lambda: read_part(()), 1 if len(shape) > 2 else 0, read_part)


def _num_bytes(tensor: LazyTensor) -> int:
  return math.prod(tensor.shape) * tensor.dtype.itemsize


def _write_all(file: BinaryIO, data: Any) -> None:
  view = memoryview(data)
  while view:
    view = view[file.write(view) :]


def _damaged(path: Path, what: str) -> CheckpointError:
  return CheckpointError(f"{path} is no safetensors file, or a damaged one: {what}")

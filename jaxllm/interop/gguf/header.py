"""The header of a GGUF file: metadata, and where each tensor lies.

Layout (github.com/ggml-org/ggml, docs/gguf.md), little-endian: "GGUF", version, counts of tensors and of metadata
entries, the entries (key, type, value), the tensors (name, dimensions, type, offset), then the data, aligned.

Files come from strangers, so every length, count and offset is held against the size of the file before
anything is allocated: what a damaged or malicious header can cost is a few times its own size.
"""

import dataclasses
import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.base.os_errors import file_errors

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
MAX_HEADER = 1 << 28  # bytes; the largest vocabularies take a tenth of that
MAX_DIMENSIONS, MAX_NAME, MAX_KEY = 4, 128, 1 << 16
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, np.dtype] = {
  0: np.dtype("<u1"),
  1: np.dtype("<i1"),
  2: np.dtype("<u2"),
  3: np.dtype("<i2"),
  4: np.dtype("<u4"),
  5: np.dtype("<i4"),
  6: np.dtype("<f4"),
  BOOL: np.dtype("?"),
  10: np.dtype("<u8"),
  11: np.dtype("<i8"),
  12: np.dtype("<f8"),
}
TYPE_IDS = {dtype: i for i, dtype in SCALARS.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """Where a tensor lies. shape: outermost dimension first (the file has them the other way round)."""

  path: Path
  type: str  # "F32", "Q4_1", …: a name of gguf.GGMLQuantizationType
  shape: tuple[int, ...]
  start: int  # byte in the file
  nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
  """metadata values are int, float, bool, str, lists of str, or numpy arrays."""

  metadata: dict[str, Any]
  tensors: dict[str, TensorInfo]


def entry(metadata: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
  """A metadata value of this Python type; `default` where there is none.

  Raises:
    CheckpointError: it is of another type.
  """
  value = metadata.get(key, default)
  if key in metadata and type(value) is not kind:  # a bool is no int here
    raise CheckpointError(f"the GGUF metadata {key} is {str(value)[:40]!r}, not of type {kind.__name__}")
  return value


def nbytes_of(type_name: str, shape: tuple[int, ...]) -> int:
  """Bytes of a tensor; rows (the last dimension) must be whole blocks."""
  import gguf

  block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
  return math.prod(shape) // block * size


def aligned(position: int, alignment: int) -> int:
  return -(-position // alignment) * alignment


def read_header(path: Path) -> Header:
  """The header of one file.

  Raises:
    CheckpointError: the file cannot be read, is damaged, or holds something unknown.
  """
  with file_errors(path), path.open("rb") as file:
    return _Reader(path, file).header()


class _Reader:
  def __init__(self, path: Path, file: BinaryIO):
    self.path, self.file = path, file
    self.size = os.fstat(file.fileno()).st_size

  def bad(self, problem: str) -> CheckpointError:
    return CheckpointError(f"{self.path} is not a usable GGUF file: {problem}")

  def room(self, count: int, size: int, what: str) -> None:
    """Refuses `count` things of at least `size` bytes that the file has no room for."""
    end = self.file.tell() + count * size
    if end > self.size:
      raise self.bad(f"it ends within {what}; download or convert it again")
    if end > MAX_HEADER:
      raise self.bad(f"{what} makes the header larger than {MAX_HEADER >> 20} MiB")

  def read(self, size: int, what: str) -> bytes:
    self.room(size, 1, what)
    data = self.file.read(size)
    if len(data) < size:  # the file shrank
      raise self.bad(f"it ends within {what}; download or convert it again")
    return data

  def number(self, code: str, what: str) -> int:
    return struct.unpack(f"<{code}", self.read(struct.calcsize(code), what))[0]

  def string(self, what: str, limit: int | None = None) -> str:
    length = self.number("Q", what)
    if limit and length > limit:
      raise self.bad(f"{what} is {length} bytes long; at most {limit} make sense")
    try:
      return self.read(length, what).decode("utf-8")
    except UnicodeDecodeError:
      raise self.bad(f"{what} is not UTF-8") from None

  def value(self, key: str) -> Any:
    what = f"the metadata {key!r}"
    kind = self.number("I", what)
    if kind == STRING:
      return self.string(what)
    if kind == ARRAY:
      item, count = self.number("I", what), self.number("Q", what)
      if item == STRING:
        self.room(count, 8, what)
        return [self.string(what) for _ in range(count)]
      if item in SCALARS:
        self.room(count, SCALARS[item].itemsize, what)
        return np.frombuffer(self.read(count * SCALARS[item].itemsize, what), SCALARS[item])
      raise self.bad(f"{what} is an array of the unknown type {item}")
    if kind not in SCALARS:
      raise self.bad(f"{what} has the unknown type {kind}")
    number = np.frombuffer(self.read(SCALARS[kind].itemsize, what), SCALARS[kind])[0]
    # The shortest decimal that is this float32: 1e-05, not 9.99999974e-06.
    return float(str(number)) if number.dtype.kind == "f" else number.item()

  def header(self) -> Header:
    if self.read(4, "its first bytes") != MAGIC:
      raise self.bad('it does not begin with "GGUF"')
    version = self.number("I", "its version")
    if version not in (2, 3):
      swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
      problem = (
        "it is big-endian; convert it again with little-endian numbers"
        if swapped in (2, 3)
        else f"version {version} is unknown; 2 and 3 can be read"
      )
      raise self.bad(problem)
    tensors, entries = self.number("Q", "its counts"), self.number("Q", "its counts")
    self.room(entries, 13, f"{entries} metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
      key = self.string("a metadata key", MAX_KEY)
      if key in metadata:
        raise self.bad(f"it has the metadata {key!r} twice")
      metadata[key] = self.value(key)
    self.room(tensors, 24, f"{tensors} tensors")
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
      name = self.string("a tensor's name", MAX_NAME)
      if name in found:
        raise self.bad(f"it has the tensor {name!r} twice")
      found[name] = self.tensor(f"the tensor {name!r}")
    return Header(metadata, self.placed(found, metadata.get(ALIGNMENT_KEY, ALIGNMENT)))

  def tensor(self, what: str) -> tuple[str, tuple[int, ...], int, int]:
    """type, shape, offset and bytes of a tensor."""
    import gguf

    dimensions = self.number("I", what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
      raise self.bad(f"{what} has {dimensions} dimensions")
    shape = tuple(self.number("Q", what) for _ in range(dimensions))[::-1]
    if 0 in shape:
      raise self.bad(f"{what} is empty: {shape}")
    type_id, offset = self.number("I", what), self.number("Q", what)
    try:
      kind = gguf.GGMLQuantizationType(type_id)
    except ValueError:
      raise self.bad(f"{what} has the unknown type {type_id}") from None
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if shape[-1] % block:
      raise self.bad(f"{what} has rows of {shape[-1]}, not whole blocks of {block} ({kind.name})")
    nbytes = nbytes_of(kind.name, shape)
    if nbytes > self.size:
      raise self.bad(f"{what} of shape {shape} is larger than the file; download or convert it again")
    return kind.name, shape, offset, nbytes

  def placed(self, found: Mapping[str, tuple], alignment: Any) -> dict[str, TensorInfo]:
    """The tensors with their place in the file, which none may leave or share."""
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
      raise self.bad(f"its alignment is {alignment!r}, not a small power of two")
    base, end, before = aligned(self.file.tell(), alignment), 0, ""
    for name, (_, _, offset, nbytes) in sorted(found.items(), key=lambda item: item[1][2]):
      if offset % alignment:
        raise self.bad(f"the tensor {name!r} is not aligned to {alignment} bytes")
      if offset < end:
        raise self.bad(f"the tensors {before!r} and {name!r} overlap")
      end, before = offset + nbytes, name
      if base + end > self.size:
        raise self.bad(f"it ends before the tensor {name!r} does; download or convert it again")
    return {
      name: TensorInfo(self.path, kind, shape, base + offset, nbytes)
      for name, (kind, shape, offset, nbytes) in found.items()
    }


_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def read_headers(path: Path) -> Header:
  """The header of a file, and if it is the first of a split model ("-00001-of-00003.gguf"), of all its parts.

  Raises:
    CheckpointError: see `read_header`; a part is missing, or `path` is not the first.
  """
  first = read_header(path)
  count = first.metadata.get("split.count", 1)
  if not isinstance(count, int) or count <= 1:
    return first
  named = _SPLIT.search(path.name)
  if not named or int(named[2]) != count:
    raise CheckpointError(f"{path} is part of a model in {count} files; keep their names (…-00001-of-{count:05}.gguf)")
  if int(named[1]) != 1:
    raise CheckpointError(f"{path} is part {int(named[1])} of {count}; give the first one")
  tensors = dict(first.tensors)
  for part in range(2, count + 1):
    file = path.with_name(_SPLIT.sub(f"-{part:05}-of-{count:05}.gguf", path.name))
    for name, info in read_header(file).tensors.items():
      if name in tensors:
        raise CheckpointError(f"{file} has the tensor {name!r}, which an earlier part has too")
      tensors[name] = info
  return Header(first.metadata, tensors)


def encode_header(metadata: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
  """A header up to the aligned start of the data.

  Args:
    metadata: int becomes uint32, float float32; see `Header`.
    tensors: (name, type, shape, offset) each.
  """
  import gguf

  tensors = list(tensors)
  parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
  parts += [_string(key) + _value(value) for key, value in metadata.items()]
  for name, kind, shape, offset in tensors:
    numbers = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    parts.append(_string(name) + numbers + struct.pack("<IQ", gguf.GGMLQuantizationType[kind], offset))
  data = b"".join(parts)
  return data.ljust(aligned(len(data), metadata.get(ALIGNMENT_KEY, ALIGNMENT)), b"\0")


def _string(text: str) -> bytes:
  data = text.encode("utf-8")
  return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
  if isinstance(value, str):
    return struct.pack("<I", STRING) + _string(value)
  if isinstance(value, list):
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
  if isinstance(value, np.ndarray):
    return struct.pack("<IIQ", ARRAY, TYPE_IDS[value.dtype], value.size) + value.tobytes()
  dtype = np.dtype("?" if isinstance(value, bool) else "<u4" if isinstance(value, int) else "<f4")
  return struct.pack("<I", TYPE_IDS[dtype]) + dtype.type(value).tobytes()

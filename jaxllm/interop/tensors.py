"""A tensor in a file: its shape and type are known, its content is read when asked for."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxllm.base.errors import CheckpointError
from jaxllm.base.os_errors import file_errors

Index = tuple[int, ...]
MAX_RANK = 16


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """shape and dtype (a numpy dtype, bfloat16 and float8 from ml_dtypes) of what `read` returns.

  A tensor that is put together from many (all layers of a parameter, say) is best taken part by part:
  `stacked` of its leading axes are to be indexed, and `read_part` reads what lies at such an index.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  stacked: int = 0
  read_part: Callable[[Index], np.ndarray] | None = None
  quantized: Callable[[Index], Any] | None = None  # of a stack that is so in files: a layer's weight, codes and scales

  def part(self, index: Index) -> np.ndarray:
    """`read()[index]` for integers that index leading axes, reading no more than that where it can."""
    if not index:
      return self.read()
    return self.read()[index] if self.read_part is None else self.read_part(index)

  def parts(self) -> Iterator[np.ndarray]:
    """The tensor in order, one part at a time."""
    return (self.part(index) for index in np.ndindex(self.shape[: self.stacked]))


Tensors = Mapping[str, LazyTensor]  # of a checkpoint, by name


def in_memory(arrays: Mapping[str, np.ndarray]) -> Tensors:
  """Arrays as the tensors of a checkpoint."""
  return {name: LazyTensor(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def from_parts(
  shape: tuple[int, ...], dtype: np.dtype, stacked: int, part: Callable[[Index], np.ndarray]
) -> LazyTensor:
  """A tensor of which `part` reads what lies at a full index of its `stacked` leading axes."""

  def read_part(index: Index) -> np.ndarray:
    if len(index) >= stacked:
      return part(index[:stacked])[index[stacked:]]
    whole = np.empty(shape[len(index) :], dtype)
    for rest in np.ndindex(shape[len(index) : stacked]):
      whole[rest] = part((*index, *rest))
    return whole

  return LazyTensor(shape, dtype, lambda: read_part(()), stacked, read_part)


def cast(tensors: Tensors, dtype: np.dtype) -> Tensors:
  """The tensors in another floating-point type, converted as they are read.

  Reading one raises CheckpointError where a number is too large for the type, as float16's limit is 65504.
  """

  def one(name: str, tensor: LazyTensor) -> LazyTensor:
    def convert(x: np.ndarray) -> np.ndarray:
      with np.errstate(over="ignore"):
        y = x.astype(dtype)
      if np.isinf(y).any() and not np.isinf(x).any():
        raise CheckpointError(f"{name} holds numbers that are too large for {dtype}; choose another dtype")
      return y

    return LazyTensor(
      tensor.shape, dtype, lambda: convert(tensor.read()), tensor.stacked, lambda i: convert(tensor.part(i))
    )

  return {name: t if t.dtype == dtype else one(name, t) for name, t in tensors.items()}


def is_possible(shape: Sequence[Any], dtype: np.dtype) -> bool:
  """Whether a shape that a stranger's file says is one that an array may have, one without elements included."""
  sizes = len(shape) <= MAX_RANK and all(type(n) is int and n >= 0 for n in shape)
  return sizes and math.prod(n or 1 for n in shape) * dtype.itemsize < 2**63


def read_bytes(path: Path, start: int, count: int, name: str) -> UInt8[np.ndarray, " count"]:
  """So many bytes of a file from a place on, which are some of the tensor `name`; the file is not mapped.

  Raises:
    CheckpointError: it ends before them, or cannot be read.
  """
  buffer = np.empty(count, np.uint8)
  with file_errors(path), path.open("rb", buffering=0) as file:
    file.seek(start)
    done = 0
    while done < count:
      read = file.readinto(buffer[done:])
      if not read:
        raise CheckpointError(f"{path} ends within the tensor {name}; copy it again")
      done += read
  return buffer

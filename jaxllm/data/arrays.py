"""Arrays in files: mapped instead of read, joined, and made once for all processes that need them."""

import collections
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxllm.base import digests
from jaxllm.base.errors import UserError
from jaxllm.base.files import new_directory
from jaxllm.base.locks import hold

log = logging.getLogger("jaxllm")
_making = threading.Lock()
_opened: dict[Path, dict[str, np.ndarray]] = {}  # the last that this process has found to be whole
_MOST_OPEN = 64


class Mapped(np.memmap):
  """A whole file as an array, which travels to other processes as its path."""

  whole: Path | None = None

  def __array_finalize__(self, obj):
    super().__array_finalize__(obj)
    self.whole = None  # of views, which are pickled as what they hold

  def __reduce__(self):
    return super().__reduce__() if self.whole is None else (mapped, (self.whole,))


def mapped(path: Path) -> np.ndarray:
  """An .npy file's array, of which only what is used is read."""
  with path.open("rb") as file:
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    offset = file.tell()
  if 0 in shape:
    return np.zeros(shape, dtype)
  array = Mapped(path, dtype, "r", offset, shape)
  array.whole = path
  return array


def flush(path: Path) -> None:
  """Brings a file to the disk."""
  with path.open("rb") as file:
    os.fsync(file.fileno())


def join_arrays(sources: Sequence[Path], target: Path) -> None:
  """One .npy file of several, along their first axis; of them one is in memory at a time."""
  first = np.load(sources[0], mmap_mode="r")
  rows = sum(len(np.load(source, mmap_mode="r")) for source in sources)
  with target.open("wb") as file:
    _write_header(file, first.dtype, (rows, *first.shape[1:]))
    for source in sources:
      file.write(np.load(source).tobytes())


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
  facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(file, facts)


def kept_arrays(place: Path, make: Callable[[], Iterator[dict[str, np.ndarray]]]) -> dict[str, np.ndarray] | None:
  """Arrays that are made once, kept in a directory, and mapped from there by whoever needs them.

  Any number of threads and processes may ask at once: one makes them, the others wait. What a process has found to
  be whole it does not check again; what is damaged is made again.

  Args:
    make: gives the arrays by name, vectors in parts that follow each other.

  Returns:
    None where the directory cannot be written: the caller then has to keep them in memory.
  """
  with _making:
    if place not in _opened:
      found = _open(place)
      if found is None:
        try:
          place.parent.mkdir(parents=True, exist_ok=True)
          with hold(place.parent, patience_s=float("inf")):
            found = _open(place) or _make(place, make)
        except (OSError, UserError) as error:
          log.warning("cannot keep %s, which is made at every start then: %s", place, error)
          return None
      _opened[place] = found
      while len(_opened) > _MOST_OPEN:
        del _opened[next(iter(_opened))]
    return _opened[place]


def _open(place: Path) -> dict[str, np.ndarray] | None:
  """The arrays that lie there, where all are as they were written."""
  try:
    files = digests.files_of(digests.read_signed(place / digests.NAME), place)
    digests.verify(place, files)
    return {name.removesuffix(".npy"): mapped(place / name) for name in files}
  except (OSError, UserError, digests.DamagedError):
    return None


def _make(place: Path, make: Callable[[], Iterator[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
  with new_directory(place, may_replace=lambda damaged: True) as new:
    with contextlib.ExitStack() as stack:
      files: dict[str, BinaryIO] = {}
      kinds: dict[str, np.dtype] = {}
      lengths: collections.Counter[str] = collections.Counter()
      for part in make():
        for name, values in part.items():
          if name not in files:
            files[name], kinds[name] = stack.enter_context((new / f"{name}.npy").open("wb")), values.dtype
            _write_header(files[name], values.dtype, (0,))
          files[name].write(np.ascontiguousarray(values, kinds[name]).tobytes())
          lengths[name] += len(values)
      for name, file in files.items():
        file.seek(0)  # numpy's headers have room for any length
        _write_header(file, kinds[name], (lengths[name],))
    digests.seal(new)
  found = _open(place)
  if found is None:
    raise OSError(5, "what was written reads back otherwise", str(place))
  return found

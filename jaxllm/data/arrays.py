"""Arrays in files: mapped instead of read, joined, and made once for all processes that need them."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxllm.base.errors import UserError
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
  try:
    facts = json.loads((place / "facts.json").read_bytes())
    for name, digest in facts.items():
      with (place / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
          return None
    return {name.removesuffix(".npy"): mapped(place / name) for name in facts}
  except (OSError, ValueError, AttributeError):
    return None


def _make(place: Path, make: Callable[[], Iterator[dict[str, np.ndarray]]]) -> dict[str, np.ndarray]:
  for old in place.parent.glob(f"{place.name}.partial-*"):  # of a process that has died
    shutil.rmtree(old, ignore_errors=True)
  partial = place.with_name(f"{place.name}.partial-{uuid.uuid4().hex}")
  partial.mkdir()
  try:
    lengths: dict[str, int] = {}
    dtypes: dict[str, np.dtype] = {}
    with contextlib.ExitStack() as stack:
      files: dict[str, BinaryIO] = {}
      for part in make():
        for name, values in part.items():
          if name not in files:
            files[name] = stack.enter_context((partial / f"{name}.raw").open("wb"))
            lengths[name], dtypes[name] = 0, values.dtype
          files[name].write(np.ascontiguousarray(values, dtypes[name]).tobytes())
          lengths[name] += len(values)
    facts = {}
    for name, length in lengths.items():
      with (partial / f"{name}.npy").open("wb") as file, (partial / f"{name}.raw").open("rb") as raw:
        _write_header(file, dtypes[name], (length,))
        shutil.copyfileobj(raw, file, 1 << 22)
      (partial / f"{name}.raw").unlink()
      with (partial / f"{name}.npy").open("rb") as file:
        facts[f"{name}.npy"] = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    (partial / "facts.json").write_text(json.dumps(facts))
    flush(partial / "facts.json")
    if place.is_dir():  # damaged
      shutil.rmtree(place)
    partial.rename(place)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  found = _open(place)
  if found is None:
    raise OSError(5, "what was written reads back otherwise", str(place))
  return found

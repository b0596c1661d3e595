"""PyTorch's files of tensors (pytorch_model.bin), read without torch and without running anything of theirs.

torch.save (torch/serialization.py) writes a zip archive whose members are not compressed: `<name>/data.pkl` is the
pickle of a dictionary of tensors, each of which names its storage, and `<name>/data/<key>` has a storage's numbers.
Before torch 1.6 it wrote five pickles (a magic number, a version, facts of the machine, the dictionary, the storages'
keys), then each storage behind its count.

A pickle is a program for a machine with a stack. `_run` is such a machine, with the instructions that torch's own
weights_only has, and with the names in `_NAMES` instead of all of Python's: nothing is imported, and nothing is called
but functions of this file. Its programs are bounded, and so are the time and memory that a step of one takes.
"""

import io
import math
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  numpy knows bfloat16 and float8 by name once it is imported
import numpy as np

from jaxllm.base.errors import CheckpointError, shown
from jaxllm.base.files import regular
from jaxllm.base.os_errors import file_errors
from jaxllm.base.strangers import BIG, MAX_BYTES
from jaxllm.interop.tensors import MAX_RANK, Index, LazyTensor, is_possible, read_bytes

MAX_STEPS = 2_000_000  # of a program; a tensor takes 28, and about 250 of its MAX_BYTES
_MEND = "which tensors do not need; where you trust it, load it with torch and save its state_dict alone"
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001

Places = dict[str, tuple[int, int]]  # name -> its first byte in the file, its bytes


class _Storage(NamedTuple):
  dtype: np.dtype
  key: str
  size: int  # in elements


class _View(NamedTuple):
  """A tensor as a program makes it, not checked yet: offset and strides count elements."""

  storage: _Storage
  offset: Any
  shape: Any
  strides: Any
  dtype: np.dtype


def read_pickled(path: Path) -> dict[str, LazyTensor]:
  """The tensors of one file, of which only the program is read; what else its dictionary has is passed over.

  Raises:
    CheckpointError: the file is missing, cut short or damaged, asks for what no tensor needs, or has its tensors in a
      dictionary within. Reading a tensor raises it where the file has become shorter.
  """
  with file_errors(path), _Bounded(regular(path)) as file:
    try:
      read = _of_zip if file.read(4) == b"PK\3\4" else _of_pickles
      value, places, swapped = read(file, path.stat().st_size)
      found = {name: view for name, view in _of(dict, value).items() if isinstance(view, _View)}
      within = next((name for name, view in value.items() if isinstance(view, dict)), None)
      if within is not None and not found:
        raise ValueError(f"its tensors stand under {shown(within)}, as trainers save them; save what is there alone")
      return {name: _tensor(path, name, view, places[view.storage.key][0], swapped) for name, view in found.items()}
    except (ValueError, LookupError, TypeError, OverflowError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
      what = str(error) if type(error) is ValueError else "it is not put together as by torch.save; copy it again"
  raise CheckpointError(f"{path} is no file of PyTorch's tensors, or a damaged one: {what}")


class _Bounded(io.FileIO):
  """A file of which no more is read at once than makes sense, whatever it says of the length of its parts."""

  def read(self, size: int | None = -1, /) -> bytes:
    if size is not None and size > MAX_BYTES:
      raise ValueError(f"a part of it takes {size} bytes, and at most {MAX_BYTES} make sense")
    return super().read(size) or b""


def _of_zip(file: _Bounded, size: int) -> tuple[Any, Places, bool]:
  """(what the program makes, where the storages are, whether their bytes are in the other order)."""
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
  root = members[0].filename.partition("/")[0] + "/"
  places: Places = {}
  sums = {}
  for member in members:
    name = member.filename.removeprefix(root)
    if name in places or member.compress_type or member.flag_bits & 1 or member.file_size != member.compress_size:
      raise ValueError(f"its member {shown(name)} is there twice, compressed or encrypted")
    file.seek(member.header_offset)
    magic, *lengths = struct.unpack("<4s22xHH", file.read(30))  # of the name, and of what fills up to an alignment
    start = member.header_offset + 30 + sum(lengths)
    if magic != b"PK\3\4" or start + member.file_size > size:
      raise ValueError(f"its member {shown(name)} is not where it says; copy it again")
    places[name], sums[name] = (start, member.file_size), member.CRC

  def content(name: str) -> bytes:
    file.seek(places[name][0])
    data = file.read(places[name][1])
    if sums[name] not in (0, zlib.crc32(data)):  # torch can be told to write none
      raise ValueError(f"the checksum of {name} in it differs; copy it again")
    return data

  order = content("byteorder") if "byteorder" in places else b"little"
  if order not in (b"little", b"big"):
    raise ValueError(f"its bytes are in the order {shown(order)}")
  value, storages = _run(io.BytesIO(content("data.pkl")))
  for key, storage in storages.items():
    if places.get(f"data/{key}", (0, -1))[1] < storage.size * storage.dtype.itemsize:
      raise ValueError(f"it lacks the storage {shown(key)}, or has not all of it; copy it again")
  return value, {key: places[f"data/{key}"] for key in storages}, order == b"big"


def _of_pickles(file: _Bounded, size: int) -> tuple[Any, Places, bool]:
  """As `_of_zip`, of a file from before torch 1.6."""
  file.seek(0)
  head = io.BytesIO(file.read(min(size, MAX_BYTES)))
  if head.getbuffer()[257:262] == b"ustar":
    raise ValueError("it is a tar archive, as torch 0.1 wrote it; load it with torch and save it again")
  if _run(head)[0] != MAGIC or _run(head)[0] != VERSION:
    raise ValueError("it does not begin as torch.save does")
  _run(head)  # facts of the machine; numbers are little-endian on all
  value, storages = _run(head)
  keys, end = _run(head)[0], head.tell()
  places: Places = {}
  for key in keys:
    if type(key) is not str or key not in storages or key in places:
      raise ValueError("its list of storages is not that of its tensors")
    file.seek(end)
    count, start = int.from_bytes(file.read(8), "little"), end + 8
    end = start + count * storages[key].dtype.itemsize
    if count != storages[key].size or end > size:
      raise ValueError(f"it lacks the storage {shown(key)}, or has not all of it; copy it again")
    places[key] = start, end - start
  return value, places, False


def _run(program: io.BytesIO) -> tuple[Any, dict[str, _Storage]]:
  """(what a pickle makes, the storages that it names); where it ends, `program` stands.

  Raises:
    ValueError: it is none, is too long, or has an instruction or name that is not known here.
    LookupError, TypeError: an instruction finds no fitting operands.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}
  storages: dict[str, _Storage] = {}

  def operands(single: int = 0) -> list[Any]:
    """So many, or those since the last mark."""
    place = max(len(stack) - single, 0) if single else marks.pop()
    items = stack[place:]
    del stack[place:]
    return items

  for step, (instruction, arg, _) in enumerate(pickletools.genops(program)):
    if step > MAX_STEPS:
      raise ValueError(f"its program has more than {MAX_STEPS} steps")
    match instruction.name:
      case "PROTO":
        pass
      case "STOP":
        return stack.pop(), storages
      case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" as name:
        stack.append(_EMPTY[name]())
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
        stack.append(arg)
      case "SHORT_BINSTRING":  # a text of Python 2
        stack.append(arg.encode("latin-1").decode())
      case "BINPUT" | "LONG_BINPUT":
        memo[arg] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[arg])
      case "MARK":
        marks.append(len(stack))
      case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
        stack.append(tuple(operands(int(name[5:] or 0))))
      case "APPEND" | "APPENDS" as name:
        items = operands(name == "APPEND")
        _of(list, stack[-1]).extend(items)
      case "SETITEM" | "SETITEMS" as name:
        items = operands(2 * (name == "SETITEM"))
        _put(_of(dict, stack[-1]), zip(items[::2], items[1::2], strict=True))
      case "BUILD":  # sets attributes, which a state dict has, with no tensors in them
        stack.pop()
        _of(dict, stack[-1])
      case "GLOBAL":
        if arg not in _NAMES:
          raise ValueError(f"it asks for {shown(arg.replace(' ', '.'))}, {_MEND}")
        stack.append(_NAMES[arg])
      case "REDUCE":
        arguments = _of(tuple, stack.pop())
        stack[-1] = stack[-1](*arguments)
      case "BINPERSID":
        stack[-1] = storage = _storage(stack[-1])
        if storages.setdefault(storage.key, storage) != storage:
          raise ValueError(f"it has two storages {shown(storage.key)}")
      case other:
        raise ValueError(f"its program has the instruction {other}, {_MEND}")
  raise ValueError("its program has no end")


def _of(kind: type, value: Any) -> Any:
  if type(value) is not kind:
    raise TypeError
  return value


def _put(table: dict[Any, Any], pairs: Iterable[Any]) -> None:
  for key, value in pairs:
    # Of other keys the hashes may take long: of nested tuples, or of large integers that collide.
    if type(key) is not str and not (type(key) is int and 0 <= key <= BIG):
      raise ValueError(f"a dictionary in it has a key that is a {type(key).__name__}")
    if key in table:
      raise ValueError(f"the name {shown(key)} stands in it twice")
    table[key] = value


def _storage(said: Any) -> _Storage:
  match said:
    case ("storage", np.dtype() as dtype, str(key), _, int(count), *view) if view in ([], [None]):
      return _Storage(dtype, key, count)
  raise ValueError("it names a storage as torch.save does not")


# What a program may name


def _table(pairs: Any = None) -> dict[Any, Any]:
  table: dict[Any, Any] = {}
  if pairs is not None:  # as Python 2 says them
    _put(table, _of(list, pairs))
    pairs.clear()  # so that a long list cannot become many tables
  return table


def _view(storage, offset, shape, strides, grad=None, hooks=None, metadata=None, *, dtype=None) -> _View:
  dtype = storage.dtype if dtype is None and type(storage) is _Storage else dtype
  if metadata or type(storage) is not _Storage or not isinstance(dtype, np.dtype):
    raise ValueError("it has a tensor that has no storage, or is the conjugate of what is there")
  return _View(storage, offset, shape, strides, dtype)


def _view_as(storage, offset, shape, strides, grad, hooks, dtype, metadata=None) -> _View:
  return _view(storage, offset, shape, strides, metadata=metadata, dtype=dtype)


_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_EMPTY |= {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
_STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"}
_STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
_LATER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")  # types without a storage
_NAMES: dict[str, Any] = {
  "collections OrderedDict": _table,
  "torch Size": lambda sizes: None,
  "torch device": lambda kind, index=None: None,
  "torch._utils _rebuild_parameter": lambda data, grad, hooks: data,
  "torch._utils _rebuild_parameter_with_state": lambda data, grad, hooks, state: data,
  "torch._utils _rebuild_tensor": _view,
  "torch._utils _rebuild_tensor_v2": _view,
  "torch._utils _rebuild_tensor_v3": _view_as,
  "torch.storage UntypedStorage": np.dtype(np.uint8),
  **{f"torch {name}Storage": np.dtype(dtype) for name, dtype in _STORAGES.items()},
  **{f"torch {dtype}": np.dtype(dtype) for dtype in (*_STORAGES.values(), *_LATER)},
}


def _tensor(path: Path, name: Any, view: _View, start: int, swapped: bool) -> LazyTensor:
  """A view that its storage, which begins at `start`, holds; it is read from its first number to its last."""
  storage, offset, shape, strides, dtype = view
  if type(name) is not str or not name.isprintable():  # names come to stand in one-line messages
    raise ValueError(f"it names a tensor {shown(name)}")
  places = (offset, *strides) if len(_of(tuple, strides)) == len(_of(tuple, shape)) <= MAX_RANK else (-1,)
  if not is_possible(shape, dtype) or not all(type(n) is int and 0 <= n < 2**63 for n in places):
    raise ValueError(f"the tensor {name} has no possible shape or place")
  strides = tuple(stride if n > 1 else 0 for n, stride in zip(shape, strides))  # of a single one any is said
  room = storage.size * storage.dtype.itemsize // dtype.itemsize
  if 0 not in shape and max(math.prod(shape), offset + _span(shape, strides)) > room:
    raise ValueError(f"the tensor {name} of shape {shape} does not lie in its storage of {room} numbers")

  def read_part(index: Index) -> np.ndarray:
    at = offset + sum(i * stride for i, stride in zip(index, strides))
    rest, steps = shape[len(index) :], strides[len(index) :]
    data = read_bytes(path, start + at * dtype.itemsize, _span(rest, steps) * dtype.itemsize, name)
    data = data.view(f"u{dtype.itemsize}")  # numpy has no strides for float8
    lying = np.lib.stride_tricks.as_strided(data, rest, [dtype.itemsize * n for n in steps])
    return np.asarray(lying.byteswap() if swapped else lying, order="C").view(dtype)

  return LazyTensor(shape, dtype, lambda: read_part(()), 1 if len(shape) > 2 else 0, read_part)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
  """How many numbers lie between the first and the last, these included."""
  return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))

"""Tokenized documents as a TFDS dataset in ArrayRecord shards, without TensorFlow.

Each record holds `tokens` (int32, no special tokens), `bytes` (the document's length) and `id`. A document of more
than `PIECE_TOKENS` tokens is several records, so that a row of a long document does not read all of it: the first has
its length, those behind have 0 bytes and the same id.
"""

import collections
import contextlib
import errno
import functools
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxllm.base.errors import DataError
from jaxllm.base.os_errors import MISSING, explain, number_of
from jaxllm.data.arrays import flush

VERSION = "1.0.0"
PIECE_TOKENS = 1 << 16
_CACHE_TOKENS = 32_000_000  # of recently read records per `TokenDocuments`; 128 MB
_MOST_READERS = 128  # shards that a process holds open
_OPTIONS = "group_size:1"  # as TFDS writes: each record can be read alone


class Record(NamedTuple):
  id: bytes
  num_bytes: int
  tokens: Int32[np.ndarray, " tokens"]


class ShardWriter:
  """One shard; `records` counts what it holds."""

  def __init__(self, path: Path):
    from array_record.python import array_record_module

    self.path, self.records, self.num_bytes = path, 0, 0
    self.long: list[tuple[int, int]] = []  # documents of several records: their number here, and how many
    self._documents = 0
    with _errors_of(path):
      self._writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)

  def write(self, record: Record) -> None:
    pieces = max(1, -(-len(record.tokens) // PIECE_TOKENS))
    if pieces > 1:
      self.long.append((self._documents, pieces))
    for piece in range(pieces):
      tokens = record.tokens[piece * PIECE_TOKENS : (piece + 1) * PIECE_TOKENS]
      data = _encoded(record.id, 0 if piece else record.num_bytes, tokens)
      with _errors_of(self.path):
        self._writer.write(data)
      self.records += 1
      self.num_bytes += len(data)
    self._documents += 1

  def close(self) -> None:
    """Brings the shard to the disk, or removes it where it is empty.

    Raises:
      OSError: what was written cannot be read again.
    """
    with _errors_of(self.path):
      self._writer.close()
      if self.records and _open(self.path).num_records() != self.records:
        raise RuntimeError("it is cut short")
    if not self.records:
      self.path.unlink()
      return
    flush(self.path)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
  """ArrayRecord's errors as those of the operating system that they stand for."""
  try:
    yield
  except OSError:
    raise
  except Exception as error:  # the library has kinds of its own, which name the cause in their text
    number = number_of(error) or errno.EIO
    raise OSError(number, os.strerror(number), str(path)) from error


def _encoded(id: bytes, num_bytes: int, tokens: np.ndarray) -> bytes:
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example()
  feature = example.features.feature
  feature["tokens"].int64_list.value.extend(tokens.tolist())
  feature["bytes"].int64_list.value.append(num_bytes)
  feature["id"].bytes_list.value.append(id)
  return example.SerializeToString(deterministic=True)


def _decoded(data: bytes) -> Record:
  from tensorflow_datasets.proto import tf_example_pb2

  feature = tf_example_pb2.Example.FromString(data).features.feature
  tokens = np.array(feature["tokens"].int64_list.value, np.int32)
  return Record(feature["id"].bytes_list.value[0], feature["bytes"].int64_list.value[0], tokens)


def shard_directory(directory: Path, name: str) -> Path:
  return directory / name / VERSION


def shard_path(directory: Path, name: str, split: str, number: int, count: int) -> Path:
  """Where TFDS looks for a shard of dataset `name`."""
  return shard_directory(directory, name) / f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_metadata(directory: Path, name: str, splits: dict[str, tuple[list[int], int]]) -> None:
  """What makes a TFDS dataset of shards that lie in place.

  Args:
    splits: the records of each shard, and the bytes of all, by split.
  """
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
      "bytes": tfds.features.Scalar(np.int64),
      "id": tfds.features.Text(),
    }
  )
  folder = shard_directory(directory, name)
  template = tfds.core.ShardedFileTemplate(
    dataset_name=name, data_dir=str(folder), filetype_suffix="array_record", template=None
  )
  infos = [
    tfds.core.SplitInfo(
      name=split, shard_lengths=lengths, num_bytes=size, filename_template=template.replace(split=split)
    )
    for split, (lengths, size) in splits.items()
  ]
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder),
    features=features,
    split_infos=infos,
    version=VERSION,
    filename_template=template,
    check_data=False,
    description="Documents tokenized by jaxllm.prepare.",
    disable_shuffling=True,
  )


def _open(path: Path) -> Any:
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(
    str(path), options="readahead_buffer_size:0", file_reader_buffer_size=32768
  )


@functools.lru_cache(maxsize=_MOST_READERS)
def _kept_open(path: Path, process: int) -> Any:
  """The shard as this process holds it open: the most recently used ones are."""
  return _open(path)


class TokenDocuments:
  """Random access to the documents of one split of a written dataset.

  Keeps recently read records. Opens its files in the process that reads, so it travels to worker processes.
  """

  def __init__(
    self,
    shards: Sequence[tuple[Path, int]],
    counts: Int[np.ndarray, " documents *parts"],
    long: Int[np.ndarray, "long 2"],
    start_id: int,
    eos_id: int,
  ):
    """Args:
    shards: the path of each, and how many records it holds.
    counts: tokens of each document, or of each part of an example.
    long: which documents are several records, and how many.
    """
    self._state = shards, counts, long, start_id, eos_id
    self._paths = [path for path, _ in shards]
    self._first = np.concatenate([[0], np.cumsum([records for _, records in shards])]).astype(np.int64)
    self._counts, self._long = counts, np.asarray(long, np.int64).reshape(-1, 2)
    self._more = np.concatenate([[0], np.cumsum(self._long[:, 1] - 1)])
    self._start_id, self._eos_id = start_id, eos_id
    self._cache: collections.OrderedDict[int, Record] = collections.OrderedDict()
    self._cached_tokens = 0
    self._lock = threading.Lock()

  def __reduce__(self):
    return TokenDocuments, self._state

  def __len__(self) -> int:
    return len(self._counts)

  def _first_record(self, index: int) -> int:
    """The number of a document's first record."""
    return index + int(self._more[np.searchsorted(self._long[:, 0], index)])

  def _record(self, number: int) -> Record:
    """Raises DataError when the shard is missing or damaged."""
    with self._lock:
      if number in self._cache:
        self._cache.move_to_end(number)
        return self._cache[number]
    shard = int(np.searchsorted(self._first, number, "right")) - 1
    try:
      record = _decoded(_kept_open(self._paths[shard], os.getpid()).read([number - int(self._first[shard])])[0])
    except Exception as error:  # array_record and protobuf raise many kinds
      path = self._paths[min(shard, len(self._paths) - 1)]
      if number_of(error) not in (None, *MISSING):
        raise DataError(explain(error, "cannot read", path) or str(error)) from error
      raise DataError(
        f"{path} is damaged (record {number - int(self._first[shard])}): "
        "delete its build and run python -m jaxllm.prepare again"
      ) from error
    with self._lock:
      if number not in self._cache:
        self._cache[number] = record
        self._cached_tokens += len(record.tokens)
      while self._cached_tokens > _CACHE_TOKENS and len(self._cache) > 1:
        self._cached_tokens -= len(self._cache.popitem(last=False)[1].tokens)
    return record

  def record(self, index: int) -> Record:
    """A whole document. Raises DataError when the shards are missing or damaged."""
    id, num_bytes, _ = self._record(self._first_record(index))
    return Record(id, num_bytes, self._tokens(index, 0, self._length(index)))

  def _length(self, index: int) -> int:
    return int(np.sum(self._counts[index], dtype=np.int64))

  def _tokens(self, index: int, start: int, stop: int) -> Int32[np.ndarray, " tokens"]:
    """Tokens [start, stop) of a document, of which no other record is read."""
    first = self._first_record(index)
    numbers = range(start // PIECE_TOKENS, max(-(-stop // PIECE_TOKENS), start // PIECE_TOKENS + 1))
    tokens = np.concatenate([self._record(first + number).tokens for number in numbers])
    before = numbers[0] * PIECE_TOKENS
    if len(tokens) < stop - before:
      raise DataError(
        f"document {index} of {self._paths[0].parent} has other tokens than the index of its build says: delete the "
        "build and run python -m jaxllm.prepare again"
      )
    return tokens[start - before : stop - before]

  def framed(self, index: int, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, " positions"]:
    """Start token, the document's tokens, EOS; of these positions [start, stop)."""
    length = self._length(index)
    stop = min(length + 2 if stop is None else stop, length + 2)
    parts = [self._tokens(index, max(start - 1, 0), min(stop - 1, length))] if start <= length and stop > 1 else []
    if start == 0:
      parts.insert(0, np.array([self._start_id], np.int32))
    if stop == length + 2:
      parts.append(np.array([self._eos_id], np.int32))
    return np.concatenate(parts)[: stop - start].astype(np.int32)

  def parts(self, index: int) -> list[Int32[np.ndarray, " tokens"]]:
    """The parts of an example, in the task's order; of a text there is one."""
    counts = self._counts[index] if self._counts.ndim == 2 else []
    return np.split(self._tokens(index, 0, self._length(index)), np.cumsum(counts)[:-1].astype(int))


def file_sizes(directory: Path) -> dict[str, int]:
  """Relative path to size in bytes, of each file under `directory`; a link to nothing is none."""
  found = {}
  for root, _, files in sorted(os.walk(directory)):
    for file in sorted(files):
      with contextlib.suppress(FileNotFoundError):
        found[os.path.relpath(os.path.join(root, file), directory)] = os.path.getsize(os.path.join(root, file))
  return found

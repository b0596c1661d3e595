"""Tokenized documents as a TFDS dataset in ArrayRecord shards, without TensorFlow.

Each record holds `tokens` (int32, no special tokens), `bytes` (the document's length) and `id`.
"""

import collections
import contextlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jaxllm.base.errors import DataError

VERSION = "1.0.0"
_CACHE_TOKENS = 32_000_000  # of recently read documents per process; 128 MB


class Record(NamedTuple):
  id: bytes
  num_bytes: int
  tokens: Int32[np.ndarray, " tokens"]


def write_shards(directory: Path, name: str, splits: dict[str, Iterator[Record]]) -> dict[str, int]:
  """Writes dataset `name` under `directory`, each split in the order given; returns shards per split.

  A split must be neither empty nor larger than 1 GB: beyond that TFDS sorts with TensorFlow's files.
  """
  import tensorflow_datasets as tfds

  with tfds.core.registered.skip_registration():

    class TokenizedDocuments(tfds.core.GeneratorBasedBuilder):
      """Documents tokenized by jaxllm.prepare."""

      name = "documents"
      VERSION = tfds.core.Version(VERSION)
      # Where TFDS would look for download checksums; to find it in a package it imports importlib_resources,
      # which it does not depend on.
      code_path = None

      def _info(self):
        features = tfds.features.FeaturesDict(
          {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "bytes": tfds.features.Scalar(np.int64),
            "id": tfds.features.Text(),
          }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, dl_manager):
        return {split: self._generate_examples(records) for split, records in splits.items()}

      def _generate_examples(self, records):
        for key, record in enumerate(records):
          yield key, {"tokens": record.tokens, "bytes": record.num_bytes, "id": record.id}

  TokenizedDocuments.name = name
  tfds.disable_progress_bar()
  builder = TokenizedDocuments(data_dir=str(directory), file_format="array_record")
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download
    builder.download_and_prepare()
  return {split: info.num_shards for split, info in builder.info.splits.items()}


class TokenDocuments:
  """Random access to the documents of some splits of a written dataset.

  Keeps recently read ones: rows of a long document are read one by one. Opens its files in the process that
  reads, so it travels to worker processes.
  """

  def __init__(
    self,
    directory: Path,
    splits: list[str],
    count: int,
    start_id: int | None = None,
    eos_id: int | None = None,
    counts: Int[np.ndarray, " documents *parts"] | None = None,
  ):
    self._directory, self._splits, self._count = directory, splits, count
    self._start_id, self._eos_id, self._counts = start_id, eos_id, counts
    self._reset()

  def _reset(self):
    self._records = None
    self._cache: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
    self._cached_tokens = 0
    self._lock = threading.Lock()

  def __getstate__(self):
    return self._directory, self._splits, self._count, self._start_id, self._eos_id, self._counts

  def __setstate__(self, state):
    self.__init__(*state)

  def __len__(self) -> int:
    return self._count

  def record(self, index: int) -> Record:
    """Raises DataError when the shards are missing or damaged."""
    try:
      if self._records is None:
        self._records = self._open()
      example = self._records[index]
    except DataError:
      raise
    except Exception as error:  # array_record and TFDS raise many kinds
      raise DataError(
        f"prepared data in {self._directory} is damaged (record {index}): delete it and run "
        "python -m jaxllm.prepare again"
      ) from error
    return Record(example["id"], int(example["bytes"]), example["tokens"])

  def _open(self):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(self._directory)).as_data_source("+".join(self._splits))
    if len(source) != self._count:
      raise DataError(
        f"prepared data in {self._directory} holds {len(source)} documents where its manifest says "
        f"{self._count}: delete it and run python -m jaxllm.prepare again"
      )
    return source

  def framed(self, index: int) -> Int32[np.ndarray, " positions_plus_1"]:
    """Start token, the document's tokens, EOS."""
    with self._lock:
      if index in self._cache:
        self._cache.move_to_end(index)
        return self._cache[index]
    ids = np.concatenate([[self._start_id], self.record(index).tokens, [self._eos_id]]).astype(np.int32)
    with self._lock:
      if index not in self._cache:
        self._cache[index] = ids
        self._cached_tokens += len(ids)
      while self._cached_tokens > _CACHE_TOKENS and len(self._cache) > 1:
        self._cached_tokens -= len(self._cache.popitem(last=False)[1])
    return ids

  def parts(self, index: int) -> list[Int32[np.ndarray, " tokens"]]:
    """The parts of an example, in the task's order; of a text there is one."""
    counts = self._counts[index] if self._counts is not None and self._counts.ndim == 2 else []
    return np.split(self.framed(index)[1:-1], np.cumsum(counts)[:-1].astype(int))


def shard_directory(directory: Path, name: str) -> Path:
  return directory / name / VERSION


def file_sizes(directory: Path) -> dict[str, int]:
  """Relative path to size in bytes, of each file under `directory`."""
  return {
    os.path.relpath(os.path.join(root, file), directory): os.path.getsize(os.path.join(root, file))
    for root, _, files in sorted(os.walk(directory))
    for file in sorted(files)
  }

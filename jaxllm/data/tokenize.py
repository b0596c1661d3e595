"""The second pass over a corpus: a unit's documents as tokens, both splits at once, straight into their shards."""

import array
import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, PARTS, make_encoder, unpacked
from jaxllm.data.job import Job, write_facts
from jaxllm.data.shards import Record, ShardWriter
from jaxllm.data.sources import Document
from jaxllm.data.survey import id_bytes, is_held_out, read_again, surveyed, witness
from jaxllm.data.tokenizers import load_tokenizer

_BATCH_BYTES = 4 << 20  # tokenized at once
SPLITS = ("train", "heldout")
Encode = Callable[[list[Document]], list[list[np.ndarray]]]  # the token ids of each part of each document


class Tokenize:
  """Does the stage "tokenize"; opened once in each process."""

  def __init__(self, job: Job):
    self._job = job
    self._encode = make_encoder(job.config, load_tokenizer(job.tokenizer))
    self._heldout = np.load(job.root / "heldout.npy", mmap_mode="r")
    self._facts = surveyed(job).facts

  def __call__(self, number: int, directory: Path) -> None:
    """Writes `train` and `heldout` shards, the counts of their tokens, held-out text, and what was counted."""
    job, expected = self._job, self._facts[number]
    index, unit = job.units[number]
    source = job.sources[index]
    seen, content = hashlib.sha256(), hashlib.sha256()
    with (directory / "heldout.bin").open("wb") as raw:
      texts = {"train": None, "heldout": raw}
      splits = {name: _Split(name, directory, job.config, self._encode, text) for name, text in texts.items()}
      for document in read_again(job, number, expected):
        witness(seen, unit, document)
        content.update(f"{document.id!r} {len(document.data)}\n".encode())
        content.update(document.data)
        if document.data:
          splits[SPLITS[is_held_out(document, job.config.task, self._heldout)]].add(document)
      if seen.hexdigest() != expected["seen"]:
        raise DataError(f"{unit.where} changed while it was being read: run python -m jaxllm.prepare again")
      facts = {name: split.finish() for name, split in splits.items()}
    bad = [error for split in splits.values() for error in split.bad]
    _write_hashes(directory, splits)
    (directory / "skipped.txt").write_text("".join(f"{error}\n" for error in (*source.skipped, *bad)), "utf-8")
    write_facts(directory, {**facts, "content": content.hexdigest(), "skipped": len(source.skipped), "bad": len(bad)})


class _Split:
  """What of a unit is of one split."""

  def __init__(self, name: str, directory: Path, config: DataConfig, encode: Encode, raw: BinaryIO | None):
    self._name, self._directory, self._config, self._encode = name, directory, config, encode
    self._shard = ShardWriter(directory / f"{name}.array_record")
    self._raw = raw
    self._batch: list[Document] = []
    self._batch_bytes = self._bytes = self._trained = 0
    self._counts, self._lengths = array.array("i"), array.array("q")
    self.hashes = array.array("Q")
    self.bad: list[str] = []

  def add(self, document: Document) -> None:
    self._batch.append(document)
    self._batch_bytes += len(document.data)
    self.hashes.append(int.from_bytes(hashlib.blake2b(document.data, digest_size=8).digest(), "big"))
    if self._batch_bytes >= _BATCH_BYTES:
      self._write()

  def _write(self) -> None:
    task, batch = self._config.task, self._batch
    for document, parts in zip(batch, _encoded(self._encode, batch, self._config.on_bad_row)):
      if isinstance(parts, DataError):  # a record without tokens holds its place
        self.bad.append(str(parts))
        parts = [np.zeros(0, np.int32)] * PARTS[task][0]
      elif task in CHAT:
        self._trained += sum(int((unpacked(runs) > 0).sum()) for runs in parts[PARTS[task][1] :])
      self._counts.extend(len(part) for part in parts)
      self._bytes += len(document.data)
      if self._raw is not None:
        self._raw.write(document.data)
        self._lengths.append(len(document.data))
      tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
      self._shard.write(Record(id_bytes(document), len(document.data), tokens.astype(np.int32)))
    self._batch, self._batch_bytes = [], 0

  def finish(self) -> dict[str, Any]:
    """Writes the rest; what the manifest says of it."""
    self._write()
    self._shard.close()
    counts, task = np.frombuffer(self._counts, np.int32), self._config.task
    tokens = counts
    if task in PARTS:
      counts = counts.reshape(-1, PARTS[task][0])
      tokens = counts[:, : PARTS[task][1]]
    np.save(self._directory / f"{self._name}_counts.npy", counts)
    if self._raw is not None:
      np.save(self._directory / f"{self._name}_lengths.npy", np.frombuffer(self._lengths, np.int64))
    return {
      "documents": len(counts),
      "bytes": self._bytes,
      "tokens": int(tokens.sum(dtype=np.int64)),
      "trained": self._trained,
      "records": self._shard.records,
      "shard_bytes": self._shard.num_bytes,
      "long": self._shard.long,
    }


def _write_hashes(directory: Path, splits: dict[str, _Split]) -> None:
  """Sorted hashes of the texts, and which are held out."""
  hashes = np.concatenate([np.frombuffer(splits[name].hashes, np.uint64) for name in SPLITS])
  held = np.repeat(np.arange(2, dtype=np.uint64), [len(splits[name].hashes) for name in SPLITS])
  order = np.argsort(hashes, kind="stable")
  np.save(directory / "texts.npy", np.stack([hashes[order], held[order]]))


def _encoded(encode: Encode, batch: list[Document], on_bad_row: str) -> Iterator[list[np.ndarray] | DataError]:
  """The parts of each document, or what is wrong with it."""
  if not batch:
    return iter(())
  try:
    return iter(encode(batch))
  except DataError as error:
    if on_bad_row == "error":
      raise
    if len(batch) == 1:
      return iter([error])
  half = len(batch) // 2
  return itertools.chain(_encoded(encode, batch[:half], on_bad_row), _encoded(encode, batch[half:], on_bad_row))

"""What `prepare` wrote and where: `manifest.json` of a data directory.

The manifest names the build directory beside it that holds tokenizer, shards and held-out text. It is written
last and replaced atomically, so a data directory always shows one whole build or none. It knows the SHA-256 of itself
and of every file but the shards, which have sums of their own; small files are checked when the build is opened, those
that grow with the corpus when they are first used.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.base.files import local_path, regular, write_atomically
from jaxllm.base.locks import share
from jaxllm.base.os_errors import file_errors
from jaxllm.data.arrays import mapped
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, PARTS
from jaxllm.data.shards import TokenDocuments, file_sizes, shard_path
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer

FORMAT = 2
MANIFEST = "manifest.json"
READERS = "readers"  # an empty file of a build that programs lock as long as they read it
_BIG = ("token_counts_", "long_documents_", "heldout")  # files that grow with the corpus
_AGAIN = "run python -m jaxllm.prepare again"
_checked: set[tuple] = set()  # files that this process has found to be right


@dataclasses.dataclass(frozen=True)
class SplitInfo:
  documents: int = 0
  bytes: int = 0
  tokens: int = 0  # without special tokens
  trained: int = 0  # of instruction data: tokens with a weight above 0
  records: tuple[int, ...] = ()  # of each shard, in order

  @property
  def shards(self) -> int:
    return len(self.records)


@dataclasses.dataclass(frozen=True)
class SourceInfo:
  name: str
  train: SplitInfo
  heldout: SplitInfo
  fingerprint: str  # digest of all documents: ids, lengths and bytes
  empty_documents: int  # left out
  not_utf8_documents: int
  skipped_rows: int = 0  # bad ones, listed in `Prepared.skipped_path`
  null_rows: int = 0  # left out for want of a field


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An opened manifest."""

  dir: Path
  build: str  # directory under `dir`
  key: str  # of everything that decides the content
  sources: tuple[SourceInfo, ...]
  tokenizer_fingerprint: str
  vocab_size: int
  start_id: int
  eos_id: int
  files: dict[str, list]  # of the build: size and SHA-256 by relative path; of shards the size alone
  config: dict
  masks: str = ""  # of instruction data: digest of the template and of what is trained
  duplicates: int = 0  # documents whose text stood before already
  heldout_duplicates: int = 0  # held-out documents whose text stands in the training split too
  format: int = FORMAT

  @property
  def root(self) -> Path:
    return self.dir / self.build

  @property
  def content(self) -> str:
    """Digest of the documents, their split and their tokens; unlike `key` blind to paths and file times."""
    facts = [[source.name, source.fingerprint, source.train.tokens] for source in self.sources]
    split = [self.config["heldout_fraction"], self.config["max_heldout_bytes"]]
    return digest([facts, split, self.tokenizer_fingerprint, *([self.masks] if self.masks else [])])

  @property
  def tokenizer_dir(self) -> Path:
    return self.root / "tokenizer"

  @property
  def heldout_path(self) -> Path:
    """The raw bytes of all held-out documents, one after another, sources in order."""
    return self.root / "heldout.bin"

  @property
  def skipped_path(self) -> Path:
    """What was wrong with each row that was skipped, one a line."""
    return self.root / "skipped.txt"

  def tokenizer(self) -> Tokenizer:
    return load_tokenizer(self.tokenizer_dir)

  def total(self, split: str, field: str) -> int:
    """Sum over the sources, as in total("train", "tokens")."""
    return sum(getattr(getattr(source, split), field) for source in self.sources)

  def documents(self, source: SourceInfo, split: str) -> TokenDocuments:
    info: SplitInfo = getattr(source, split)
    shards = [
      (shard_path(self.root / "shards", source.name, split, number, info.shards), records)
      for number, records in enumerate(info.records)
    ]
    long = np.load(self.checked(long_path(self.root, source.name, split)))
    return TokenDocuments(shards, self.token_counts(source, split), long, self.start_id, self.eos_id)

  def train_text(self, most: int | None = None) -> Iterator[bytes]:
    """The training documents as text again: tokenizing loses nothing.

    Args:
      most: bytes, about; where there are more, documents at equal distances in each source.
    """
    tokenizer, total = self.tokenizer(), self.total("train", "bytes")
    step = 1 if most is None else max(1, -(-total // most))
    for source in self.sources:
      documents = self.documents(source, "train")
      for index in range(0, len(documents), step):
        yield tokenizer.decode_bytes(documents.record(index).tokens.tolist())

  def token_counts(self, source: SourceInfo, split: str) -> Int[np.ndarray, " documents *parts"]:
    """Tokens of each document, or of each part of an example, in the shards' order; mapped, not read."""
    return mapped(self.checked(counts_path(self.root, source.name, split)))

  def heldout_lengths(self) -> Int[np.ndarray, " documents"]:
    """Bytes of each held-out document, in the order of `heldout_path`."""
    return mapped(self.checked(self.root / "heldout_lengths.npy"))

  def heldout_texts(self) -> Iterator[bytes]:
    """The held-out documents, sources in order; one is in memory at a time."""
    with self.checked(self.heldout_path).open("rb") as file:
      for length in self.heldout_lengths():
        yield file.read(int(length))

  def checked(self, path: Path) -> Path:
    """The path of a file of the build, once this process has seen that it is what was written.

    Raises:
      DataError: it is not, or cannot be read.
    """
    name = os.path.relpath(path, self.root)
    if name not in self.files or not path.is_file():
      raise self.damaged(name)
    with file_errors(path, kind=DataError):
      status = path.stat()
    key = str(path), status.st_size, status.st_mtime_ns, *self.files[name]
    if key not in _checked and file_facts(path, status.st_size) != list(self.files[name]):
      raise self.damaged(name)
    _checked.add(key)
    return path

  def damaged(self, name: str) -> DataError:
    """The error of a file that is not what was written."""
    return DataError(
      f"{self.root / name} is damaged or missing: delete {self.dir / MANIFEST} and run python -m jaxllm.prepare again"
    )


def is_shard(name: str) -> bool:
  """Whether a file of a build is one that has sums of its own."""
  return ".array_record-" in name


def file_facts(path: Path, size: int) -> list:
  """Size and SHA-256 of a file, of a shard the size alone."""
  if is_shard(path.name):
    return [size]
  with file_errors(path, kind=DataError), path.open("rb") as file:
    return [size, hashlib.file_digest(file, "sha256").hexdigest()]


def long_path(root: Path, source: str, split: str) -> Path:
  return root / f"long_documents_{source}_{split}.npy"


def counts_path(root: Path, source: str, split: str) -> Path:
  return root / f"token_counts_{source}_{split}.npy"


def content_config(config: DataConfig) -> dict:
  """The settings that decide what prepare writes; the others only decide how it is read."""
  sources = [dataclasses.asdict(source) for source in config.sources]
  for source in sources:
    for name in ("weight", "format", "columns")[: 1 if config.task in CHAT else 3]:
      del source[name]
  settings = {
    "sources": sources,
    "tokenizer": dataclasses.asdict(config.tokenizer),
    "heldout_fraction": config.heldout_fraction,
    "max_heldout_bytes": config.max_heldout_bytes,
    # Tasks that read texts share one build.
    "examples": [config.task, config.labels] if config.task in PARTS else None,
  }
  if config.task in CHAT:
    settings["chat"] = dataclasses.asdict(config.chat)
  if config.on_bad_row != "error":
    settings["on_bad_row"] = config.on_bad_row
  return json.loads(json.dumps(settings))


def digest(facts) -> str:
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_manifest(prepared: Prepared) -> None:
  facts = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(prepared, dir=""))))  # type: ignore[arg-type]
  del facts["dir"]
  write_atomically(prepared.dir / MANIFEST, json.dumps(facts | {"sha256": digest(facts)}, indent=2))


def read_manifest(directory: str | os.PathLike, *, missing_ok: bool = False) -> Prepared | None:
  """None when there is no manifest, or one of another format.

  Args:
    missing_ok: None too where a build has lost its manifest.

  Raises:
    DataError: it is damaged, or deleted beside a build; ConfigError for a URL.
  """
  path = local_path(directory) / MANIFEST
  try:
    with file_errors(path, kind=DataError):
      text = regular(path).read_bytes() if os.path.lexists(path) else None
    if text is None:
      if not missing_ok and any(path.parent.glob("build-*")):
        raise DataError(f"{path} is missing, without which its build is worth nothing: {_AGAIN}")
      return None
    facts = json.loads(text)
    if facts["format"] != FORMAT:
      return None
    if facts.pop("sha256") != digest(facts):
      raise ValueError("its sum is another")
    facts["sources"] = tuple(_source_info(source) for source in facts["sources"])
    return Prepared(dir=path.parent, **facts)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise DataError(f"{path} is damaged: delete it and {_AGAIN}") from error


def _source_info(facts: dict) -> SourceInfo:
  splits = {s: SplitInfo(**{**facts[s], "records": tuple(facts[s]["records"])}) for s in ("train", "heldout")}
  return SourceInfo(**{**facts, **splits})


def damaged_files(prepared: Prepared) -> list[str]:
  """Files that are not there, not of the size that the manifest says, or small and other than they were written."""
  sizes = file_sizes(prepared.root)
  wrong = [name for name, (size, *_) in prepared.files.items() if sizes.get(name) != size]
  small = [name for name in prepared.files if not is_shard(name) and not name.startswith(_BIG)]
  return wrong or [name for name in small if file_facts(prepared.root / name, sizes[name]) != prepared.files[name]]


def open_prepared(config: DataConfig) -> Prepared:
  """The build in `config.dir`.

  Raises DataError when nothing is prepared there, when it was prepared with other settings, or when a file is
  missing, cut short or changed.
  """
  prepared = open_any(config.dir)
  wanted = content_config(config)
  changed = [name for name in wanted | prepared.config if wanted.get(name) != prepared.config.get(name)]
  if changed:
    raise DataError(
      f"{config.dir} was prepared with another data.{changed[0]}: run python -m jaxllm.prepare again, or "
      "choose another data.dir"
    )
  return prepared


def open_any(directory: str | os.PathLike) -> Prepared:
  """The build in a directory, whatever its settings; no `prepare` removes it while this program runs.

  Raises DataError when nothing is prepared there, or when a file is missing, cut short or changed.
  """
  prepared = read_manifest(directory)
  if prepared is None and (local_path(directory) / MANIFEST).exists():
    raise DataError(f"{directory} was prepared by another version of jaxllm: {_AGAIN}")
  if prepared is None:
    raise DataError(f"no prepared data in {directory}: run python -m jaxllm.prepare with this config first")
  share(prepared.root / READERS)
  broken = damaged_files(prepared)
  if broken:
    raise prepared.damaged(broken[0])
  return prepared

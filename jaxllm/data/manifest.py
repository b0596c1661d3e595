"""What `prepare` wrote and where: `manifest.json` of a data directory.

The manifest names the build directory beside it that holds tokenizer, shards and held-out text. It is written
last and replaced atomically, so a data directory always shows one whole build or none.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import DataError
from jaxllm.base.files import local_path, write_atomically
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, PARTS
from jaxllm.data.shards import TokenDocuments, file_sizes, shard_directory
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer

FORMAT = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class SplitInfo:
  documents: int = 0
  bytes: int = 0
  tokens: int = 0  # without special tokens
  trained: int = 0  # of instruction data: tokens with a weight above 0
  shards: int = 0
  parts: tuple[str, ...] = ()  # TFDS splits, in order


@dataclasses.dataclass(frozen=True)
class SourceInfo:
  name: str
  train: SplitInfo
  heldout: SplitInfo
  fingerprint: str  # SHA-256 of all documents: ids, lengths and bytes
  empty_documents: int  # left out
  not_utf8_documents: int
  skipped_rows: int = 0  # bad ones, listed in `Prepared.skipped_path`


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
  files: dict[str, int]  # of the build: size by relative path
  config: dict
  masks: str = ""  # of instruction data: digest of the template and of what is trained
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
    directory = shard_directory(self.root / "shards", source.name)
    counts = self.token_counts(source, split)
    return TokenDocuments(directory, list(info.parts), info.documents, self.start_id, self.eos_id, counts)

  def train_text(self) -> bytes:
    """The training documents as text again, one after another: tokenizing loses nothing."""
    tokenizer = self.tokenizer()
    return b"".join(
      tokenizer.decode_bytes(documents.record(i).tokens.tolist())
      for documents in (self.documents(source, "train") for source in self.sources)
      for i in range(len(documents))
    )

  def token_counts(self, source: SourceInfo, split: str) -> Int[np.ndarray, " documents *parts"]:
    """Tokens of each document, or of each part of an example, in the shards' order."""
    return np.load(counts_path(self.root, source.name, split))

  def heldout_lengths(self) -> Int[np.ndarray, " documents"]:
    """Bytes of each held-out document, in the order of `heldout_path`."""
    return np.load(self.root / "heldout_lengths.npy")


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
  facts = dataclasses.asdict(prepared)
  del facts["dir"]
  write_atomically(prepared.dir / MANIFEST, json.dumps(facts, indent=2))


def read_manifest(directory: str | os.PathLike) -> Prepared | None:
  """None when there is no manifest, or one of another format; DataError when it is damaged; ConfigError for a URL."""
  path = local_path(directory) / MANIFEST
  try:
    facts = json.loads(path.read_bytes())
    if facts["format"] != FORMAT:
      return None
    facts["sources"] = tuple(_source_info(source) for source in facts["sources"])
    return Prepared(dir=path.parent, **facts)
  except FileNotFoundError:
    return None
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{path} is damaged: delete it and run python -m jaxllm.prepare again") from error


def _source_info(facts: dict) -> SourceInfo:
  splits = {s: SplitInfo(**{**facts[s], "parts": tuple(facts[s]["parts"])}) for s in ("train", "heldout")}
  return SourceInfo(**{**facts, **splits})


def missing_files(prepared: Prepared) -> list[str]:
  """Files that are not there, or not of the size that the manifest says."""
  sizes = file_sizes(prepared.root)
  return [name for name, size in prepared.files.items() if sizes.get(name) != size]


def open_prepared(config: DataConfig) -> Prepared:
  """The build in `config.dir`.

  Raises DataError when nothing is prepared there, when it was prepared with other settings, or when a file is
  missing or cut short.
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
  """The build in a directory, whatever its settings.

  Raises DataError when nothing is prepared there, or when a file is missing or cut short.
  """
  prepared = read_manifest(directory)
  if prepared is None:
    raise DataError(f"no prepared data in {directory}: run python -m jaxllm.prepare with this config first")
  broken = missing_files(prepared)
  if broken:
    raise DataError(
      f"{prepared.root / broken[0]} is missing or cut short: delete {prepared.dir / MANIFEST} and run "
      "python -m jaxllm.prepare again"
    )
  return prepared

"""From a corpus to tokenized shards: split, train or load the tokenizer, tokenize, write, publish.

Everything goes into a build directory that nothing refers to until the manifest, written last, names it; a
run killed at any moment leaves the previous build, or none.
"""

import array
import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt64

from jaxllm.base.errors import DataError
from jaxllm.base.files import local_path
from jaxllm.base.locks import hold
from jaxllm.data import manifest as manifests
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import (
  CHAT,
  PARTS,
  content_of,
  example_sources,
  make_encoder,
  question_of,
  texts_of,
  unpacked,
)
from jaxllm.data.manifest import Prepared, SourceInfo, SplitInfo
from jaxllm.data.shards import Record, file_sizes, write_shards
from jaxllm.data.sources import Document, Source, open_source
from jaxllm.data.text import is_utf8
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.data.train_tokenizer import train_sentencepiece

_BATCH_BYTES = 4 << 20  # tokenized at once
_PART_BYTES = 128 << 20  # of text per TFDS split: one split's records must stay under 1 GB
Encode = Callable[[list[Document]], list[list[np.ndarray]]]  # the token ids of each part of each document
_RECORD_BYTES = 256  # counted for what a record holds besides its text
_SHOWN = 20  # skipped rows that are printed; a file has them all


class PreparedInfo(NamedTuple):
  prepared: Prepared
  already: bool  # nothing had to be done
  seconds: float


class _Survey(NamedTuple):
  """What one pass over a source found; arrays are per non-empty document."""

  source: Source
  hashes: UInt64[np.ndarray, " documents"]
  sizes: UInt64[np.ndarray, " documents"]
  empty: int
  not_utf8: int
  fingerprint: str


@dataclasses.dataclass
class _Tally:
  """What was counted while a split was written."""

  counts: array.array = dataclasses.field(default_factory=lambda: array.array("q"))  # tokens of each part
  trained: int = 0
  bad: list[str] = dataclasses.field(default_factory=list)


def prepare(config: DataConfig, log: Callable[[str], None] = print) -> PreparedInfo:
  """Makes `config.dir` hold the corpus, tokenized; does nothing when it already does.

  The work is skipped when the settings and the corpus' files (names, sizes, times) are those of the last
  build. Raises DataError for anything wrong with the corpus, the tokenizer or the directory.
  """
  started = time.monotonic()
  _check(config)
  directory = local_path(config.dir)
  sources = [open_source(source, content_of(config.task), config.on_bad_row) for source in example_sources(config)]
  names = [_slug(source.name) for source in sources]
  for name in names:
    if names.count(name) > 1:
      raise DataError(f"two data sources are called {name!r}: give them different names with their `name`")
  content = manifests.content_config(config)
  split = ["by what is asked"] if config.task in CHAT else []
  stamps = [source.stamp for source in sources]
  key = manifests.digest([manifests.FORMAT, content, names, stamps, _tokenizer_stamp(config), *split])
  with _locked(directory):
    prepared = manifests.read_manifest(directory)
    already = prepared is not None and prepared.key == key and not manifests.missing_files(prepared)
    try:
      if prepared is None or not already:
        prepared = _build(config, directory, key, [s._replace(name=n) for s, n in zip(sources, names)], log)
    finally:
      _remove_other_builds(directory, keep=prepared.build if prepared else None)
  return PreparedInfo(prepared, already, time.monotonic() - started)


def _check(config: DataConfig) -> None:
  if not config.sources:
    raise DataError("data.sources is empty: name at least one corpus")
  if not 0 <= config.heldout_fraction < 1:
    raise DataError(f"data.heldout_fraction is {config.heldout_fraction}; it must be at least 0 and below 1")


def _slug(name: str) -> str:
  """TFDS dataset names are lower-case identifiers."""
  slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
  return slug if slug[:1].isalpha() else f"source_{slug}".rstrip("_")


def _tokenizer_stamp(config: DataConfig) -> str | list[str]:
  if not config.tokenizer.path:
    return _mask_stamp(config, None) if config.task in CHAT else ""
  tokenizer = load_tokenizer(config.tokenizer.path)
  return [tokenizer.fingerprint, _mask_stamp(config, tokenizer)] if config.task in CHAT else tokenizer.fingerprint


def _mask_stamp(config: DataConfig, tokenizer: Tokenizer | None) -> str:
  """Digest of what decides on the tokens of conversations, and on which are trained."""
  templates = {} if tokenizer is None else tokenizer.chat_templates
  if config.chat.template:
    templates = {"default": _read_template(config.chat.template)}
  return manifests.digest([templates, dataclasses.asdict(config.chat)])


def _read_template(path: str) -> str:
  try:
    return local_path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(f"cannot read data.chat.template {path}: {error}") from error


def _with_template(config: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer with the chat template that the config names, which a model trained on this data keeps."""
  if config.task in CHAT and config.chat.template:
    tokenizer.settings["chat_template"] = _read_template(config.chat.template)
  return tokenizer


@contextlib.contextmanager
def _locked(directory: Path):
  """Two processes that prepare the same directory take turns; the second finds the work done."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with hold(directory, patience_s=math.inf):
      yield
  except OSError as error:
    raise DataError(f"cannot write the data directory {directory}: {error.strerror or error}") from error


def _remove_other_builds(directory: Path, keep: str | None) -> None:
  for path in directory.glob("build-*"):
    if path.name != keep:
      shutil.rmtree(path)


def _build(config: DataConfig, directory: Path, key: str, sources: list[Source], log) -> Prepared:
  surveys = [_survey(source, config.task, log) for source in sources]
  heldout = _choose_heldout(surveys, config)
  if not sum(int(survey.sizes[~held].sum()) for survey, held in zip(surveys, heldout)):
    raise DataError("the corpus has no text to train on: every document is empty or held out")
  if config.heldout_fraction and not any(held.any() for held in heldout):
    log(
      "warning: no document is held out, so there is nothing to evaluate on: split the corpus into more "
      "documents, or raise data.heldout_fraction or data.max_heldout_bytes"
    )

  name = f"build-{key[:8]}-{time.time_ns():x}"
  root = directory / name
  root.mkdir()
  tokenizer = _with_template(config, _make_tokenizer(config, surveys, heldout))
  start_id, eos_id = tokenizer.start_id, tokenizer.eos_id
  assert eos_id is not None  # start_id has raised where documents cannot be told apart
  tokenizer.save(root / "tokenizer")
  encode, infos = make_encoder(config, tokenizer), []
  with open(root / "heldout.bin", "wb") as raw:
    for survey, held in zip(surveys, heldout):
      infos.append(_write_source(survey, held, config, encode, root, raw))
      _report_skipped(survey.source, root, log)
  np.save(root / "heldout_lengths.npy", np.concatenate([s.sizes[held] for s, held in zip(surveys, heldout)]))
  prepared = Prepared(
    dir=directory,
    build=name,
    key=key,
    sources=tuple(infos),
    tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size,
    start_id=start_id,
    eos_id=eos_id,
    files=file_sizes(root),
    config=manifests.content_config(config),
    masks=_mask_stamp(config, tokenizer) if config.task in CHAT else "",
  )
  os.sync()  # the files must be on disk before the manifest that vouches for them
  manifests.write_manifest(prepared)
  return prepared


def _survey(source: Source, task: str, log) -> _Survey:
  hashes, sizes = array.array("Q"), array.array("Q")
  content = hashlib.sha256()
  empty, not_utf8, first = 0, 0, ""
  for document in source.documents():
    content.update(f"{document.id!r} {len(document.data)}\n".encode())
    content.update(document.data)
    if not document.data:
      empty += 1
      continue
    if not is_utf8(document.data):
      not_utf8 += 1
      first = first or document.id
    key = question_of(document) if task in CHAT else _id_bytes(document)
    hashes.append(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big"))
    sizes.append(len(document.data))
  if not hashes and source.skipped:
    raise DataError(f"all {len(source.skipped)} rows of data source {source.name!r} are bad: {source.skipped[0]}")
  if not hashes:
    raise DataError(f"data source {source.name!r} is empty: it has {empty} documents, none with text")
  if not_utf8:
    log(f"warning: {not_utf8} documents of {source.name!r} are not UTF-8, the first is {first!r}; their bytes are kept")
  return _Survey(
    source,
    np.frombuffer(hashes, np.uint64),
    np.frombuffer(sizes, np.uint64),
    empty,
    not_utf8,
    content.hexdigest(),
  )


def _id_bytes(document: Document) -> bytes:
  return document.id.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def _choose_heldout(surveys: list[_Survey], config: DataConfig) -> list[Bool[np.ndarray, " documents"]]:
  """Which documents are held out: those that hash below the fraction, lowest first up to the limit.

  With a fraction above 0 and two hashes or more, the lowest is held out whatever the fraction. Documents with one hash
  stay together, and are trained on where they are more than the fraction of all.
  """
  hashes = np.concatenate([survey.hashes for survey in surveys])
  sizes = np.concatenate([survey.sizes for survey in surveys])
  held = np.zeros(len(hashes), bool)
  room = float("inf") if config.max_heldout_bytes is None else config.max_heldout_bytes
  _, same, counts = np.unique(hashes, return_inverse=True, return_counts=True)
  few = np.flatnonzero(counts[same] <= max(1, config.heldout_fraction * len(hashes)))
  if config.heldout_fraction > 0 and len(counts) > 1 and len(few):
    few = few[np.argsort(hashes[few], kind="stable")]
    below = int((hashes[few] < config.heldout_fraction * 2.0**64).sum())
    chosen = few[: max(below, counts[same[few[0]]])]
    for documents in np.split(chosen, 1 + np.flatnonzero(np.diff(hashes[chosen]))):
      if (size := int(sizes[documents].sum())) <= room:
        held[documents] = True
        room -= size
  return np.split(held, np.cumsum([len(survey.hashes) for survey in surveys])[:-1])


def _select(survey: _Survey, wanted: Bool[np.ndarray, " documents"]) -> Iterator[Document]:
  documents = (document for document in survey.source.documents() if document.data)
  for document, size, take in zip(documents, survey.sizes, wanted):
    if len(document.data) != size:
      raise DataError(f"{document.id} changed while it was being read: run python -m jaxllm.prepare again")
    if take:
      yield document


def _make_tokenizer(config: DataConfig, surveys: list[_Survey], heldout) -> Tokenizer:
  if config.tokenizer.path:
    return load_tokenizer(config.tokenizer.path)
  documents = (document for survey, held in zip(surveys, heldout) for document in _select(survey, ~held))
  texts = (text for document in documents for text in texts_of(document, config.task))
  total = sum(int(survey.sizes[~held].sum()) for survey, held in zip(surveys, heldout))
  return train_sentencepiece(texts, config.tokenizer, total)


def _write_source(survey: _Survey, held, config: DataConfig, encode: Encode, root: Path, raw) -> SourceInfo:
  wanted = {"train": ~held, "heldout": held}
  parts: dict[str, dict[str, np.ndarray]] = {split: _parts(split, mask, survey) for split, mask in wanted.items()}
  tallies = {split: _Tally() for split in wanted}
  generators = {
    part: _records(survey, mask, config, encode, tallies[split], raw if split == "heldout" else None)
    for split in wanted
    for part, mask in parts[split].items()
  }
  shards = write_shards(root / "shards", survey.source.name, generators)
  bad = [error for tally in tallies.values() for error in tally.bad]
  if len(bad) == len(survey.hashes):
    raise DataError(f"all {len(bad)} examples of data source {survey.source.name!r} are bad: {bad[0]}")
  survey.source.skipped.extend(bad)
  infos = {}
  for split, mask in wanted.items():
    tally = tallies[split]
    lengths = np.frombuffer(tally.counts, np.int64)
    tokens = lengths.sum()
    if config.task in PARTS:
      lengths = lengths.reshape(mask.sum(), PARTS[config.task][0])
      tokens = lengths[:, : PARTS[config.task][1]].sum()
    np.save(manifests.counts_path(root, survey.source.name, split), lengths)
    infos[split] = SplitInfo(
      documents=int(mask.sum()),
      bytes=int(survey.sizes[mask].sum()),
      tokens=int(tokens),
      trained=tally.trained,
      shards=sum(shards[part] for part in parts[split]),
      parts=tuple(parts[split]),
    )
  return SourceInfo(
    name=survey.source.name,
    **infos,
    fingerprint=survey.fingerprint,
    empty_documents=survey.empty,
    not_utf8_documents=survey.not_utf8,
    skipped_rows=len(survey.source.skipped),
  )


def _report_skipped(source: Source, root: Path, log) -> None:
  if not source.skipped:
    return
  with open(root / "skipped.txt", "a", encoding="utf-8") as file:
    file.writelines(f"{error}\n" for error in source.skipped)
  for error in source.skipped[:_SHOWN]:
    log(f"skipped: {error}")
  if len(source.skipped) > _SHOWN:
    log(f"skipped: {len(source.skipped) - _SHOWN} more rows of {source.name}, all listed in {root / 'skipped.txt'}")


def _parts(split: str, wanted, survey: _Survey) -> dict[str, Bool[np.ndarray, " documents"]]:
  """TFDS splits of bounded size: "train", "train_1", … and the documents of each."""
  cost = np.where(wanted, survey.sizes + _RECORD_BYTES, 0).astype(np.int64)
  part = (np.cumsum(cost) - cost) // _PART_BYTES
  used = np.unique(part[wanted])
  return {f"{split}_{n}" if n else split: wanted & (part == number) for n, number in enumerate(used)}


def _records(survey: _Survey, wanted, config: DataConfig, encode: Encode, tally: _Tally, raw) -> Iterator[Record]:
  for batch in _batches(_select(survey, wanted)):
    for document, parts in zip(batch, _encoded(encode, batch, config.on_bad_row)):
      if isinstance(parts, DataError):  # a record without tokens holds its place
        tally.bad.append(str(parts))
        parts = [np.zeros(0, np.int32)] * PARTS[config.task][0]
      elif config.task in CHAT:
        token_parts = PARTS[config.task][1]
        tally.trained += sum(int((unpacked(runs) > 0).sum()) for runs in parts[token_parts:])
      tally.counts.extend(len(part) for part in parts)
      if raw is not None:
        raw.write(document.data)
      yield Record(_id_bytes(document), len(document.data), np.concatenate(parts).astype(np.int32))


def _encoded(encode: Encode, batch: list[Document], on_bad_row: str) -> list[list[np.ndarray] | DataError]:
  """The parts of each document, or what is wrong with it."""
  try:
    return list(encode(batch))
  except DataError as error:
    if on_bad_row == "error":
      raise
    if len(batch) == 1:
      return [error]
  half = len(batch) // 2
  return [*_encoded(encode, batch[:half], on_bad_row), *_encoded(encode, batch[half:], on_bad_row)]


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.data)
    if size >= _BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch

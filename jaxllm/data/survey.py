"""The first pass over a corpus: how much there is, what is bad, and which documents are held out."""

import array
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt64

from jaxllm.base.errors import DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.examples import CHAT, question_of
from jaxllm.data.job import Job, write_facts
from jaxllm.data.readers import Marks
from jaxllm.data.sources import Document
from jaxllm.data.text import is_utf8
from jaxllm.data.units import Unit, count_lines, numbered

_AT_ONCE = 1 << 20  # hashes that are looked at together; what a merge holds in memory
Hashes = UInt64[np.ndarray, " documents"]


def uncounted(job: Job) -> list[Unit]:
  """The units of the stage "lines": parts of files whose lines nobody has counted yet."""
  return [unit for _, unit in job.units if unit.first is None]


def count_unit(job: Job, number: int, directory: Path) -> None:
  """The lines of a part of a file; stage "lines"."""
  write_facts(directory, {"lines": count_lines(uncounted(job)[number])})


def number_units(job: Job) -> None:
  """Numbers the units' lines, once the stage "lines" is done."""
  lines = iter([job.facts("lines", number)["lines"] for number in range(len(uncounted(job)))])
  for source in job.sources:
    source.units = numbered(source.units, lines)


def groups_of(job: Job) -> list[list[int]]:
  """The units that are surveyed together: of a source with `max_documents` all, one after another."""
  groups = []
  for source, numbers in zip(job.sources, job.numbers):
    groups += [[n] for n in numbers] if source.config.max_documents is None else [numbers] if numbers else []
  return groups


def survey_group(job: Job, number: int, directory: Path) -> None:
  """What there is in some units; stage "survey"."""
  units, room = job.units, None  # type: ignore[var-annotated]
  found = {}
  for unit in groups_of(job)[number]:
    source = job.sources[units[unit][0]]
    room = source.config.max_documents if room is None else room
    facts, keys = _survey(job, unit, room)
    found[unit] = facts
    np.save(directory / f"{unit}.npy", keys)
    room = None if room is None else room - facts["documents"] - facts["empty"]
  write_facts(directory, {str(unit): facts for unit, facts in found.items()})


def _survey(job: Job, number: int, limit: int | None) -> tuple[dict, UInt64[np.ndarray, "2 documents"]]:
  index, unit = job.units[number]
  source = job.sources[index]
  keys, sizes = array.array("Q"), array.array("Q")
  seen = hashlib.sha256()
  empty, not_utf8, first = 0, 0, ""
  for document in source.read(unit, limit):
    witness(seen, unit, document)
    if not document.data:
      empty += 1
      continue
    if not is_utf8(document.data):
      not_utf8 += 1
      first = first or document.id
    keys.append(key_of(document, job.config.task))
    sizes.append(len(document.data))
  hashes = np.frombuffer(keys, np.uint64)
  order = np.argsort(hashes, kind="stable")
  facts = {
    "documents": len(hashes),
    "bytes": sum(sizes),
    "empty": empty,
    "not_utf8": not_utf8,
    "first": first,
    "nulls": source.nulls,
    "skipped": len(source.skipped),
    "first_skipped": source.skipped[0] if source.skipped else "",
    "marks": dict(source.marks),
    "seen": seen.hexdigest(),
  }
  return facts, np.stack([hashes[order], np.frombuffer(sizes, np.uint64)[order]])


def witness(seen: Any, unit: Unit, document: Document) -> None:
  """Puts into a digest what every pass must see alike: of files, whose sizes and times are looked at, how long the
  documents are; of what has no files all of it."""
  seen.update(b"%d\n" % len(document.data))
  if not unit.files:
    seen.update(document.data)


def key_of(document: Document, task: str) -> int:
  """The hash that says whether a document is held out."""
  key = question_of(document) if task in CHAT else id_bytes(document)
  return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def is_held_out(document: Document, task: str, hashes: Hashes) -> bool:
  """Whether a document's hash is among the sorted ones of what is held out."""
  key = np.uint64(key_of(document, task))
  at = np.searchsorted(hashes, key)
  return bool(at < len(hashes) and hashes[at] == key)


def id_bytes(document: Document) -> bytes:
  return document.id.encode("utf-8", "surrogateescape")  # file names need not be UTF-8


def read_again(job: Job, number: int, facts: dict) -> Iterator[Document]:
  """The documents of a unit of which the survey has found these facts: no more than it has read."""
  index, unit = job.units[number]
  source = job.sources[index]
  return source.read(unit, None if source.config.max_documents is None else facts["documents"] + facts["empty"])


class Surveyed(NamedTuple):
  """What the survey found, by unit."""

  facts: dict[int, dict]
  keys: list[Path]  # files of sorted hashes and the documents' sizes


def surveyed(job: Job) -> Surveyed:
  """All results of the stage "survey".

  Raises:
    DataError: a source has no document with text.
  """
  facts: dict[int, dict] = {}
  keys = []
  for number, group in enumerate(groups_of(job)):
    facts |= {int(unit): one for unit, one in job.facts("survey", number).items()}
    keys += [job.place("survey", number) / f"{unit}.npy" for unit in group]
  for source, numbers in zip(job.sources, job.numbers):
    mine = [facts[number] for number in numbers]
    if sum(one["documents"] for one in mine):
      continue
    skipped, empty = sum(one["skipped"] for one in mine), sum(one["empty"] for one in mine)
    if skipped:
      first = next(one["first_skipped"] for one in mine if one["skipped"])
      raise DataError(f"all {skipped} rows of data source {source.name!r} are bad: {first}")
    nulls = sum(one["nulls"] for one in mine)
    more = f", and {nulls} rows without the field" if nulls else ""
    raise DataError(f"data source {source.name!r} is empty: it has {empty} documents, none with text{more}")
  return Surveyed(facts, keys)


def warnings_of(job: Job, facts: dict[int, dict]) -> list[str]:
  """What a person should know of the sources."""
  lines = []
  for source, numbers in zip(job.sources, job.numbers):
    mine = [facts[number] for number in numbers]
    bad = sum(one["not_utf8"] for one in mine)
    if bad:
      first = next(one["first"] for one in mine if one["first"])
      lines.append(f"{bad} documents of {source.name!r} are not UTF-8, the first is {first!r}; their bytes are kept")
    marks = sum((Marks(one["marks"]) for one in mine), Marks())
    for name, count in marks.items():
      if name != "utf-8-sig":
        lines.append(f"{count} files of {source.name!r} are {name.upper()} by their byte order mark, and read as such")
  return lines


class Heldout(NamedTuple):
  hashes: Hashes  # sorted, each once
  documents: int
  bytes: int


def choose_heldout(files: Sequence[Path], config: DataConfig) -> Heldout:
  """Which documents are held out: those that hash below the fraction, lowest first up to the limit.

  With a fraction above 0 and two hashes or more, the lowest is held out whatever the fraction. Documents with one hash
  stay together, and are trained on where they are more than the fraction of all.

  Args:
    files: sorted hashes and the documents' sizes, as the survey writes them.
  """
  ends = [(one.shape[1], one[0, 0], one[0, -1]) for one in _opened(files)]
  total = sum(count for count, _, _ in ends)
  if config.heldout_fraction <= 0 or not ends or min(low for _, low, _ in ends) == max(high for _, _, high in ends):
    return Heldout(np.zeros(0, np.uint64), 0, 0)  # nothing asked for, or one hash
  most = max(1, config.heldout_fraction * total)
  end = config.heldout_fraction * 2.0**64
  room = float("inf") if config.max_heldout_bytes is None else config.max_heldout_bytes
  chosen: list[np.ndarray] = []
  documents = size = 0
  met = False  # a group that may be held out
  for part in _ranges(files, total, _AT_ONCE):
    hashes, first, counts = np.unique(part[0], return_index=True, return_counts=True)
    sizes = np.add.reduceat(part[1], first)
    few = counts <= most
    wanted = np.flatnonzero(few & (hashes < end))
    if not met and not len(wanted):
      wanted = np.flatnonzero(few)[:1]
    met = met or len(wanted) > 0
    if room < float("inf"):
      kept = []
      for group in wanted.tolist():
        if int(sizes[group]) <= room:
          kept.append(group)
          room -= int(sizes[group])
      wanted = np.array(kept, np.int64)
    chosen.append(hashes[wanted])
    documents += int(counts[wanted].sum())
    size += int(sizes[wanted].sum())
    if room <= 0 or (met and hashes[-1] >= end):
      break
  return Heldout(np.concatenate(chosen), documents, size)


def _opened(files: Sequence[Path]) -> Iterator[np.ndarray]:
  """The arrays that hold something, mapped one after another: each mapping keeps a file open."""
  for file in files:
    if (found := np.load(file, mmap_mode="r")).shape[1]:
      yield found


def _ranges(files: Sequence[Path], total: int, at_once: int) -> Iterator[UInt64[np.ndarray, "rows n"]]:
  """All columns of arrays that are sorted by their first row, in its order, some at a time; equal ones together."""
  parts = max(1, -(-total // at_once))
  edges = [round(2**64 * part / parts) for part in range(parts + 1)]
  for low, high in zip(edges, edges[1:]):
    found = []
    for one in _opened(files):
      start, stop = np.searchsorted(one[0], np.uint64(low)), one.shape[1]
      if high < 2**64:
        stop = np.searchsorted(one[0], np.uint64(high))
      found.append(np.array(one[:, start:stop]))
    part = np.concatenate(found, axis=1)
    if part.shape[1]:
      yield part[:, np.argsort(part[0], kind="stable")]


class Duplicates(NamedTuple):
  documents: int  # whose text stood before already
  heldout: int  # of held-out documents: that stand in the training split too


def count_duplicates(files: Sequence[Path]) -> Duplicates:
  """How often documents repeat, by a hash of 8 bytes of their text.

  Args:
    files: sorted hashes, and 1 for each that is of a held-out document.
  """
  repeated = heldout = 0
  for hashes, held in _ranges(files, sum(one.shape[1] for one in _opened(files)), 4 * _AT_ONCE):
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    kept = np.add.reduceat(held, first)
    repeated += len(hashes) - len(counts)
    heldout += int(kept[kept < counts].sum())
  return Duplicates(repeated, heldout)

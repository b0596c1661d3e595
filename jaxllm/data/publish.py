"""The end of a prepare: the units' results become one build, and the manifest names it."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxllm.base import digests
from jaxllm.base.errors import DataError
from jaxllm.data import manifest as manifests
from jaxllm.data.arrays import flush, join_arrays
from jaxllm.data.job import Job
from jaxllm.data.manifest import Prepared, SourceInfo, SplitInfo
from jaxllm.data.shards import file_sizes, shard_directory, shard_path, write_metadata
from jaxllm.data.survey import count_duplicates, surveyed
from jaxllm.data.tokenize import SPLITS
from jaxllm.data.tokenizers import load_tokenizer

_SHOWN = 20  # skipped rows that are printed; a file has them all


def publish(job: Job, key: str, masks: str, log: Callable[[str], None]) -> Prepared:
  """Makes a build of the results of all stages, without copying shards, and writes the manifest.

  Raises:
    DataError: all examples of a source are bad.
  """
  name = f"build-{key[:8]}-{time.time_ns():x}"
  root = job.root.parent / name
  root.mkdir()
  tokenizer = load_tokenizer(job.tokenizer)
  assert tokenizer.eos_id is not None  # start_id has raised where documents cannot be told apart
  shutil.copytree(job.tokenizer, root / "tokenizer", ignore=shutil.ignore_patterns(digests.NAME))
  places = [job.place("tokenize", number) for number in range(len(job.units))]
  facts = [job.facts("tokenize", number) for number in range(len(job.units))]
  survey = surveyed(job).facts
  infos = []
  for source, slug, mine in zip(job.sources, job.slugs, job.numbers):
    _report_skipped(source.name, [places[n] for n in mine], root, log)
    splits = {}
    for split in SPLITS:
      splits[split] = _split(root, slug, split, [places[n] for n in mine], [facts[n][split] for n in mine])
    documents = sum(info.documents for info in splits.values())
    bad = sum(facts[n]["bad"] for n in mine)
    if bad == documents:
      first = next(line for n in mine for line in _lines(places[n] / "skipped.txt"))
      raise DataError(f"all {bad} examples of data source {source.name!r} are bad: {first}")
    write_metadata(
      root / "shards",
      slug,
      {
        split: (list(info.records), sum(facts[n][split]["shard_bytes"] for n in mine))
        for split, info in splits.items()
        if info.records
      },
    )
    infos.append(
      SourceInfo(
        name=slug,
        **splits,
        fingerprint=manifests.digest([facts[n]["content"] for n in mine]),
        empty_documents=sum(survey[n]["empty"] for n in mine),
        not_utf8_documents=sum(survey[n]["not_utf8"] for n in mine),
        skipped_rows=sum(facts[n]["skipped"] + facts[n]["bad"] for n in mine),
        null_rows=sum(survey[n]["nulls"] for n in mine),
      )
    )
  _concatenate([place / "heldout.bin" for place in places], root / "heldout.bin")
  join_arrays([place / "heldout_lengths.npy" for place in places], root / "heldout_lengths.npy")
  duplicates = count_duplicates([place / "texts.npy" for place in places])
  if duplicates.heldout:
    log(
      f"warning: {duplicates.heldout} held-out documents stand in the training split too, word for word: remove "
      "duplicates from the corpus, or what is measured on them is memory"
    )
  sizes = file_sizes(root)
  (root / manifests.READERS).touch()
  prepared = Prepared(
    dir=root.parent,
    build=name,
    key=key,
    sources=tuple(infos),
    tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size,
    start_id=tokenizer.start_id,
    eos_id=tokenizer.eos_id,
    files={file: manifests.file_facts(root / file, size) for file, size in sizes.items()},
    config=manifests.content_config(job.config),
    masks=masks,
    duplicates=duplicates.documents,
    heldout_duplicates=duplicates.heldout,
  )
  for file in sizes:  # on the disk before the manifest that vouches for them; shards are there already
    if not manifests.is_shard(file):
      flush(root / file)
  manifests.write_manifest(prepared)
  return prepared


def _split(root: Path, slug: str, split: str, places: list[Path], facts: list[dict]) -> SplitInfo:
  """Brings the shards and counts of a split to where they belong."""
  full = [(place, one) for place, one in zip(places, facts) if one["records"]]
  shard_directory(root / "shards", slug).mkdir(parents=True, exist_ok=True)
  for number, (place, _) in enumerate(full):
    _link(place / f"{split}.array_record", shard_path(root / "shards", slug, split, number, len(full)))
  join_arrays([place / f"{split}_counts.npy" for place in places], manifests.counts_path(root, slug, split))
  long, before = [], 0
  for one in facts:
    long += [(before + document, pieces) for document, pieces in one["long"]]
    before += one["documents"]
  np.save(manifests.long_path(root, slug, split), np.array(long, np.int64).reshape(-1, 2))
  return SplitInfo(
    **{name: sum(one[name] for one in facts) for name in ("documents", "bytes", "tokens", "trained")},
    records=tuple(one["records"] for _, one in full),
  )


def _link(source: Path, target: Path) -> None:
  """The file under a second name; where the file system has no such thing, a copy."""
  try:
    os.link(source, target)
  except OSError:
    shutil.copyfile(source, target)
    flush(target)


def _concatenate(sources: Sequence[Path], target: Path) -> None:
  with target.open("wb") as out:
    for source in sources:
      with source.open("rb") as file:
        shutil.copyfileobj(file, out, 1 << 22)


def _lines(path: Path) -> Iterator[str]:
  with path.open(encoding="utf-8", errors="surrogateescape") as file:
    for line in file:
      yield line.rstrip("\n")


def _report_skipped(source: str, places: list[Path], root: Path, log: Callable[[str], None]) -> None:
  count = 0
  with (root / "skipped.txt").open("a", encoding="utf-8", errors="surrogateescape") as file:
    for place in places:
      for line in _lines(place / "skipped.txt"):
        file.write(f"{line}\n")
        if count < _SHOWN:
          log(f"skipped: {line}")
        count += 1
  if count > _SHOWN:
    log(f"skipped: {count - _SHOWN} more rows of {source}, all listed in {root / 'skipped.txt'}")
  if not (root / "skipped.txt").stat().st_size:
    (root / "skipped.txt").unlink()

"""From a corpus to tokenized shards: survey, split, train or load the tokenizer, tokenize, publish.

Everything goes into a working directory, `partial-…`, that nothing refers to. What is done there is done once: a run
that was killed at any moment is continued by the next one. At the end it becomes a build that the manifest, written
last, names; until then the previous build stays, or none. docs/preparing_data.md says how processes and hosts share
the work.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.base import digests
from jaxllm.base.errors import DataError, UserError
from jaxllm.base.files import local_path, new_directory, new_file
from jaxllm.base.locks import hold, is_shared
from jaxllm.base.os_errors import explain, file_errors
from jaxllm.data import manifest as manifests
from jaxllm.data.config import DataConfig
from jaxllm.data.crew import do_stage
from jaxllm.data.examples import CHAT, content_of, example_sources, texts_of
from jaxllm.data.job import Job, drop_damaged, open_job
from jaxllm.data.manifest import Prepared
from jaxllm.data.publish import publish
from jaxllm.data.sources import open_source
from jaxllm.data.survey import (
  Heldout,
  choose_heldout,
  is_held_out,
  number_units,
  read_again,
  surveyed,
  uncounted,
  warnings_of,
)
from jaxllm.data.tokenizers import Tokenizer, load_tokenizer
from jaxllm.data.train_tokenizer import train_sentencepiece

_SAMPLED = 64  # times the bytes that a tokenizer is trained on: what is read to choose them from
_WAIT_S = 1.0  # between looks at what another host does
# Of our own names: somebody's build-release may lie beside them.
_PARTIAL, _BUILD = re.compile(r"partial-[0-9a-f]{16}"), re.compile(r"build-[0-9a-f]{8}-[0-9a-f]+")
STAGES = ("lines", "survey", "tokenize")


class PreparedInfo(NamedTuple):
  prepared: Prepared
  already: bool  # nothing had to be done
  seconds: float


def prepare(
  config: DataConfig,
  log: Callable[[str], None] = print,
  processes: int | None = None,
  shared: bool = False,
) -> PreparedInfo:
  """Makes `config.dir` hold the corpus, tokenized; does nothing when it already does.

  The work is skipped when the settings and the corpus' files (names, sizes, times) are those of the last
  build. Raises DataError for anything wrong with the corpus, the tokenizer or the directory.

  Args:
    processes: of this machine; None: as many as it has cores, or one where there is little to do.
    shared: other hosts run the same on the same directory, and share the work.
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
  job = Job(directory / f"partial-{key[:16]}", config, sources, names)
  prepared: Prepared | None
  helps = False
  with _errors_in(directory):
    directory.mkdir(parents=True, exist_ok=True)
    while True:
      with _alone(directory, shared) as leads:
        if leads:
          prepared, already = _lead(job, key, processes, log)
          break
      # Another host leads; this one helps until all is done, or until it takes over.
      if not helps:
        log(f"another process prepares {directory}: helping it")
      helps = True
      prepared, already = manifests.read_manifest(directory, missing_ok=True), False
      if _is_whole(prepared, key):
        break
      _help(job, processes, log)
  assert prepared is not None
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
  with file_errors(path, "cannot read data.chat.template", DataError):
    try:
      return local_path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise DataError(f"data.chat.template {path} is not in UTF-8") from error


def _with_template(config: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer with the chat template that the config names, which a model trained on this data keeps."""
  if config.task in CHAT and config.chat.template:
    tokenizer.settings["chat_template"] = _read_template(config.chat.template)
  return tokenizer


@contextlib.contextmanager
def _alone(directory: Path, shared: bool) -> Iterator[bool]:
  """Two processes that prepare one directory take turns; hosts that share the work do not wait: one of them leads."""
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(hold(directory, patience_s=0 if shared else math.inf))
      leads = True
    except UserError:
      if not shared or not os.access(directory / "lock", os.W_OK):
        raise
      leads = False
    yield leads


@contextlib.contextmanager
def _errors_in(directory: Path) -> Iterator[None]:
  """What the operating system refuses, as one line with the path and what to do."""
  try:
    yield
  except OSError as error:
    path = Path(os.fsdecode(error.filename or directory))
    if not path.is_relative_to(directory):
      raise DataError(explain(error, "cannot read") or f"cannot read {path}: {error}") from error
    line = explain(error, "cannot write", directory) or f"cannot write {path}: {error}"
    raise DataError(f"{line}; the same command then goes on from what is done") from error


def _is_whole(prepared: Prepared | None, key: str) -> bool:
  """Whether there is a build of this key, and all of it."""
  return prepared is not None and prepared.key == key and not manifests.damaged_files(prepared)


def _lead(job: Job, key: str, processes: int | None, log: Callable[[str], None]) -> tuple[Prepared, bool]:
  directory = job.root.parent
  try:
    before = manifests.read_manifest(directory, missing_ok=True)
  except DataError:  # it is damaged, and about to be written anew
    before = None
  already = _is_whole(before, key)
  _remove(directory, _PARTIAL, None if already else job.root.name, log)
  kept = before
  try:
    if not already:
      kept = _build(job, key, processes, log)
      _remove(directory, _PARTIAL, None, log)
  finally:
    _remove(directory, _BUILD, kept.build if kept else None, log)
  assert kept is not None
  return kept, already


def _remove(directory: Path, pattern: re.Pattern[str], keep: str | None, log: Callable[[str], None]) -> None:
  for path in directory.iterdir():
    if not pattern.fullmatch(path.name) or path.name == keep:
      continue
    if is_shared(path / manifests.READERS):
      log(f"{path} is what a program that still runs reads; the next prepare removes it")
      continue
    # Another host that has just helped may still put things there; they go the next time.
    shutil.rmtree(path, ignore_errors=pattern is _PARTIAL)


def _help(job: Job, processes: int | None, log: Callable[[str], None]) -> None:
  """Does its share of the stages that the leading host announces, as long as that one is at this job."""
  stage = job.announced()
  if stage not in STAGES:
    time.sleep(_WAIT_S)
    return
  with contextlib.suppress(FileNotFoundError):  # it has just been finished, and cleared away
    other = open_job(job.root)
    if stage != "lines":
      number_units(other)
    do_stage(other, stage, processes, log)
    if other.announced() == stage:
      time.sleep(_WAIT_S)


def _build(job: Job, key: str, processes: int | None, log: Callable[[str], None]) -> Prepared:
  """All stages in order; what a run before has done is taken over."""
  job.root.mkdir(exist_ok=True)
  job.write()
  drop_damaged(job, log)
  if uncounted(job):
    job.announce("lines")
    do_stage(job, "lines", processes, log)
    number_units(job)
  job.announce("survey")
  do_stage(job, "survey", processes, log)
  found = surveyed(job)
  for line in warnings_of(job, found.facts):
    log(f"warning: {line}")
  heldout = choose_heldout(found.keys, job.config)
  total = sum(facts["documents"] for facts in found.facts.values())
  if total == heldout.documents:
    raise DataError("the corpus has no text to train on: every document is empty or held out")
  if job.config.heldout_fraction and not heldout.documents:
    log(
      "warning: no document is held out, so there is nothing to evaluate on: split the corpus into more "
      "documents, or raise data.heldout_fraction or data.max_heldout_bytes"
    )
  with new_file(job.root / "heldout.npy") as file:  # another host may be reading the one of a run before
    np.save(file, heldout.hashes)
  if not job.tokenizer.is_dir():
    tokenizer = _with_template(job.config, _make_tokenizer(job, found.facts, heldout))
    _ = tokenizer.start_id  # raises where documents cannot be told apart
    with new_directory(job.tokenizer) as place:
      tokenizer.save(place)
      digests.seal(place)
  job.announce("tokenize")
  do_stage(job, "tokenize", processes, log)
  job.announce("publish")
  masks = _mask_stamp(job.config, load_tokenizer(job.tokenizer)) if job.config.task in CHAT else ""
  return publish(job, key, masks, log)


def _make_tokenizer(job: Job, facts: dict[int, dict], heldout: Heldout) -> Tokenizer:
  """The tokenizer that the config names, or one trained on documents spread evenly over all units."""
  config = job.config
  if config.tokenizer.path:
    return load_tokenizer(config.tokenizer.path)
  wanted = _SAMPLED * config.tokenizer.train_bytes
  total = sum(one["bytes"] for one in facts.values())
  step = max(1, total // max(wanted, 1))  # units that are passed over, of a corpus much larger than what is needed
  numbers = [number for number in range(0, len(job.units), step) if facts[number]["documents"]]
  taken = sum(facts[number]["bytes"] for number in numbers) - (heldout.bytes if step == 1 else 0)

  def texts() -> Iterator[bytes]:
    for number in numbers:
      for document in read_again(job, number, facts[number]):
        if document.data and not is_held_out(document, config.task, heldout.hashes):
          yield from texts_of(document, config.task)

  return train_sentencepiece(texts(), config.tokenizer, taken)

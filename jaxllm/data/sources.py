"""Documents out of files, TFDS and Hugging Face datasets, always in the same order.

A document is bytes with a stable id (source name, path relative to the source, row), so that the split into
training and held-out documents survives moving the corpus or adding to it.
"""

import dataclasses
import functools
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxllm.base.errors import DataError
from jaxllm.data.config import SourceConfig
from jaxllm.data.libraries import Library, import_library, stamp_of
from jaxllm.data.paths import match_files, patterns_of, root_of
from jaxllm.data.readers import Marks, no_field, rows_of, units_of_files
from jaxllm.data.streams import MOST_BYTES, without_suffix
from jaxllm.data.text import to_bytes
from jaxllm.data.units import Unit, count_lines, numbered


class Document(NamedTuple):
  id: str
  data: bytes
  where: str = ""  # what errors call it: file and line


Content = Callable[[Any, SourceConfig], bytes | None]  # a document's bytes from a row; None: it has none of its fields


class Source:
  """A corpus of which `documents()` starts a new pass, and `read` gives a part.

  `stamp` changes when the corpus (probably) did. Of the last pass `skipped` holds the errors of the bad rows, `nulls`
  counts the rows that were left out for want of a field, `marks` the byte order marks.
  """

  def __init__(
    self, config: SourceConfig, name: str, units: Sequence[Unit], content: Content | None, on_bad_row: str, stamp: str
  ):
    self.config, self.name, self.units, self.stamp = config, name, list(units), stamp
    self._content, self._on_bad_row = content or _fields, on_bad_row
    self._clear()

  def _clear(self) -> None:
    self.skipped: list[str] = []
    self.nulls = 0
    self.marks = Marks()

  @functools.cached_property
  def library(self) -> Library:
    """Where the rows come from, of what has no files of its own."""
    return Library(self.config)

  def documents(self) -> Iterator[Document]:
    """All documents up to `max_documents`, the empty ones too."""
    count, limit = 0, self.config.max_documents
    skipped: list[str] = []
    nulls, marks = 0, Marks()
    lines = (count_lines(unit) for unit in self.units if unit.first is None)
    for unit in numbered(self.units, lines):
      for document in self.read(unit, None if limit is None else limit - count):
        yield document
        count += 1
      skipped, nulls, marks = skipped + self.skipped, nulls + self.nulls, marks + self.marks
      if count == limit:
        break
    self.skipped, self.nulls, self.marks = skipped, nulls, marks

  def read(self, unit: Unit, limit: int | None = None) -> Iterator[Document]:
    """The documents of a unit, whose lines are numbered, up to a limit."""
    self._clear()
    count = 0
    if limit == 0:
      return
    rows = rows_of(unit, self.config, self.marks) if unit.files else self.library.read(unit)
    for key, row, where in rows:
      try:
        data = self._converted(row, where)
      except DataError as error:
        if self._on_bad_row == "error":
          raise
        self.skipped.append(str(error))
        continue
      if data is None:
        self.nulls += 1
        continue
      yield Document(self.name + key, data, where)
      count += 1
      if count == limit:
        return

  def _converted(self, row: Any, where: str) -> bytes | None:
    if isinstance(row, DataError):
      raise row
    try:
      data = self._content(row, self.config)
    except DataError as error:
      raise DataError(f"{where}: {error}") from error
    if data is not None and len(data) > MOST_BYTES:
      raise DataError(f"{where} is a document of over {MOST_BYTES >> 20} MiB; split it into several")
    return data


def stdlib_sources() -> SourceConfig:
  """The running Python's own standard library, 20 to 30 MB of code that every machine has.

  Some Linux distributions strip its tests, which leaves about a third less.
  """
  root = sysconfig.get_paths()["stdlib"]
  path = f"{root}/**/*.py,!{root}/site-packages/**,!{root}/dist-packages/**,!**/__pycache__/**"
  return SourceConfig(kind="text", path=path, name="stdlib")


def stdlib_functions(*fields: str) -> SourceConfig:
  """The documented functions of the standard library, each an example of these fields."""
  return dataclasses.replace(stdlib_sources(), kind="python", fields=fields, name="stdlib_functions")


def source_name(config: SourceConfig) -> str:
  """What reports call the source: `config.name`, or one made from its path."""
  if config.name:
    return config.name
  if config.kind in ("tfds", "huggingface"):
    base = config.path.rstrip("/")
    return os.path.basename(base) if os.path.exists(base) else base
  include, _ = patterns_of(config.path)
  if len(include) == 1 and (not glob.has_magic(include[0]) or os.path.isfile(include[0])):
    return os.path.splitext(without_suffix(os.path.basename(include[0])))[0]
  return os.path.basename(root_of(include)) or "text"


def open_source(config: SourceConfig, content: Content | None = None, on_bad_row: str = "error") -> Source:
  """Opens one corpus.

  Args:
    content: makes a document of a whole row; None: the document is the row's fields.
    on_bad_row: "error", or "skip": rows that do not parse, or that are none of `content`, are left out and listed.

  Raises DataError when nothing matches the path, a line or row does not parse, the field is missing, or the
  library that the kind needs is not installed.
  """
  if not config.path:
    raise DataError(f"data.sources has a {config.kind} source without a path: set its `path`")
  if config.streaming and config.kind != "huggingface":
    raise DataError(f"data source {config.path!r} has streaming, which is for kind 'huggingface'")
  if config.kind in ("tfds", "huggingface"):
    source = Source(config, source_name(config), [], content, on_bad_row, "")
    source.units, source.stamp = source.library.units(), source.library.stamp
    return source
  files = match_files(config)
  if config.kind == "parquet":
    import_library("pyarrow")
  stamp = stamp_of([(file.relative, file.size, file.time) for file in files])
  return Source(config, source_name(config), units_of_files(files, config), content, on_bad_row, stamp)


def _fields(row: Any, config: SourceConfig) -> bytes | None:
  """A document's bytes: of an example its fields as a JSON list. None: a field is not there, and is to be skipped."""
  if not isinstance(row, dict):
    raise DataError(f"a JSON object is needed, this is {type(row).__name__}")
  names = config.fields or (config.field,)
  if config.on_null == "error" and (missing := [name for name in names if name not in row]):
    raise DataError(no_field(missing[0], row))
  values = [row.get(name) for name in names]
  if config.on_null == "skip" and any(value is None for value in values):
    return None
  if config.on_null == "keep":
    values = ["" if value is None else value for value in values]
  if not config.fields:
    if not isinstance(values[0], str | bytes):
      kind = type(values[0]).__name__
      advice = (
        "; choose what to do with such rows with the source's `on_null`"
        if values[0] is None
        else f" ({str(values[0])[:40]}); write it as a string, or set data.on_bad_row to 'skip'"
      )
      raise DataError(f"field {config.field!r} must be text, this is {kind}{advice}")
    return to_bytes(values[0])
  plain = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]
  try:
    return json.dumps(plain).encode()
  except TypeError as error:
    raise DataError("an example's fields must be text, numbers or lists of them") from error

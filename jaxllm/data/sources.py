"""Documents out of files, TFDS and Hugging Face datasets, always in the same order.

A document is bytes with a stable id (source name, path relative to the source, row), so that the split into
training and held-out documents survives moving the corpus or adding to it.
"""

import codecs
import contextlib
import dataclasses
import glob
import hashlib
import io
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxllm.base.errors import DataError
from jaxllm.data.config import SourceConfig
from jaxllm.data.python_functions import python_functions
from jaxllm.data.text import to_bytes


class Document(NamedTuple):
  id: str
  data: bytes
  where: str = ""  # what errors call it: file and line


class Source(NamedTuple):
  """An opened corpus: `documents()` starts a new pass, `stamp` changes when the corpus (probably) did."""

  name: str
  documents: Callable[[], Iterator[Document]]
  stamp: str
  skipped: list[str]  # the errors of the bad rows that the last pass has left out


Content = Callable[[Any, SourceConfig], bytes]  # a document's bytes from a row


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
  include, _ = _patterns(config)
  if len(include) == 1 and not glob.has_magic(include[0]):
    return os.path.splitext(os.path.basename(include[0]))[0]
  return os.path.basename(_root(include)) or "text"


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
  name = source_name(config)
  if config.kind in ("tfds", "huggingface"):
    rows, stamp = (_open_tfds if config.kind == "tfds" else _open_huggingface)(config)
    numbered = _numbered_rows(rows, name, config)
  else:
    files = _match_files(config)
    stamp = _stamp([(relative, *_stat(path)) for relative, path in files])
    if config.kind == "parquet":
      _import("pyarrow")
    numbered = _rows_of_files(files, name, config)
  skipped: list[str] = []

  def documents() -> Iterator[Document]:
    skipped.clear()
    count = 0
    for key, row, where in numbered():
      if count == config.max_documents:
        return
      try:
        if isinstance(row, DataError):
          raise row
        data = _content(row, config, where) if content is None else _converted(content, row, config, where)
      except DataError as error:
        if on_bad_row == "error":
          raise
        skipped.append(str(error))
        continue
      yield Document(key, data, where)
      count += 1

  return Source(name, documents, stamp, skipped)


def _converted(content: Content, row: Any, config: SourceConfig, where: str) -> bytes:
  try:
    return content(row, config)
  except DataError as error:
    raise DataError(f"{where}: {error}") from error


def _rows_of_files(files, name: str, config: SourceConfig) -> Callable[[], Iterator[tuple[str, Any, str]]]:
  read = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "json": _read_json,
    "parquet": _read_parquet,
    "python": _read_python,
  }[config.kind]

  def rows():
    for relative, path in files:
      try:
        for row, values, where in read(path, relative, config):
          yield (f"{name}/{relative}" if row is None else f"{name}/{relative}:{row}"), values, where
      except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error

  return rows


def _numbered_rows(rows, name: str, config: SourceConfig) -> Callable[[], Iterator[tuple[str, Any, str]]]:
  def numbered():
    for row in range(len(rows)):
      key = f"{name}:{row}"
      try:
        example = rows[row]
      except Exception as error:  # whatever the library raises for a damaged record
        raise DataError(f"cannot read {key} of {config.path}: {_first_line(error)}") from error
      yield key, example if config.field or config.fields else without_none(example), f"{config.path} row {row}"

  return numbered


def without_none(value: Any) -> Any:
  """Without the keys that Arrow gives to all objects of a column because one of them has it."""
  if isinstance(value, dict):
    return {name: without_none(item) for name, item in value.items() if item is not None}
  return [without_none(item) for item in value] if isinstance(value, list) else value


# Files


def _patterns(config: SourceConfig) -> tuple[list[str], list[str]]:
  """Globs to include and, those written with a leading "!", to exclude."""
  parts = [os.path.expanduser(part.strip()) for part in config.path.split(",") if part.strip()]
  include = [part for part in parts if not part.startswith("!")]
  if not include:
    raise DataError(f"data source path {config.path!r} names no file: add a glob without a leading '!'")
  return include, [part[1:] for part in parts if part.startswith("!")]


def _root(patterns: list[str]) -> str:
  """The deepest directory above everything that the globs can match."""
  fixed = []
  for pattern in patterns:
    parts = os.path.abspath(pattern).split(os.sep)
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    fixed.append(os.sep.join(parts[:magic]) or os.sep)
  return os.path.commonpath(fixed)


def _match_files(config: SourceConfig) -> list[tuple[str, str]]:
  """(path relative to the source's root, path), sorted, each file once."""
  include, exclude = _patterns(config)
  excluded = [re.compile(_glob_regex(pattern)) for pattern in exclude]
  root = _root(include)
  found = {}
  for pattern in include:
    if os.path.isdir(pattern):
      raise DataError(f"data source path {pattern} is a directory: write a glob such as {pattern}/**/*.txt")
    matches = [os.path.abspath(m) for m in glob.glob(pattern, recursive=True) if os.path.isfile(m)]
    if not matches:
      what = "glob matches no file" if glob.has_magic(pattern) else "file does not exist"
      raise DataError(f"data source {what}: {pattern} (in {os.getcwd()}); mend the source's `path`")
    for path in matches:
      if not any(regex.fullmatch(path) for regex in excluded):
        found[os.path.relpath(path, root)] = path
  if not found:
    raise DataError(f"data source path {config.path!r} excludes every file that it includes")
  return sorted(found.items())


def _glob_regex(pattern: str) -> str:
  """A regex of absolute paths for the exclusions; glob.translate needs Python 3.13."""
  if not pattern.startswith("**"):
    pattern = os.path.abspath(pattern)
  pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
  wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
  return "".join(
    wild.get(piece, piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece)) for piece in pieces
  )


def _stat(path: str) -> tuple[int, int]:
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def _stamp(facts: Any) -> str:
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# Its number (of a whole file None), its fields or what is wrong with it, and what errors call it
Row = tuple[int | None, Any, str]


def _read_text(path: str, relative: str, config: SourceConfig) -> Iterator[Row]:
  with open(path, "rb") as file:
    yield None, {config.field or "text": file.read()}, path


def _read_jsonl(path: str, relative: str, config: SourceConfig) -> Iterator[Row]:
  with open(path, "rb") as file:
    for number, line in enumerate(file, 1):
      line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
      if not line.strip():
        continue
      where = f"{path}:{number}"
      try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
      except (ValueError, RecursionError) as error:
        row = DataError(f"{where}: not a JSON object: {_first_line(error)}; mend or remove the line")
      yield number, row, where


def _read_json(path: str, relative: str, config: SourceConfig) -> Iterator[Row]:
  """The objects of a list, each by the line on which it begins."""
  with open(path, "rb") as file:
    text = file.read().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
  if not text.lstrip().startswith("["):
    raise DataError(f"{path}:1: not a JSON list of objects; one object a line is kind 'jsonl'")
  decoder, between = json.JSONDecoder(), re.compile(r"\s*(,?)\s*")
  at, row = text.index("[") + 1, 0
  line = 1 + text.count("\n", 0, at)
  while True:
    space = between.match(text, at)
    assert space is not None  # it matches nothing too
    line += text.count("\n", at, space.end())
    if text.startswith("]", space.end()) and not space[1]:
      break
    try:
      if bool(space[1]) != bool(row):
        raise ValueError("one comma must stand between two objects, and none elsewhere")
      value, at = decoder.raw_decode(text, space.end())
    except (ValueError, RecursionError) as error:
      raise DataError(f"{path}:{line}: not a JSON list of objects: {_first_line(error)}; mend it") from error
    yield row, value, f"{path}:{line}"
    line += text.count("\n", space.end(), at)
    row += 1
  if rest := text[space.end() + 1 :].strip():
    line += text.count("\n", 0, text.index(rest[0], space.end() + 1)) - text.count("\n", 0, space.end())
    raise DataError(f"{path}:{line}: {rest[:20]!r} stands behind the JSON list's end; remove it")


def _read_parquet(path: str, relative: str, config: SourceConfig) -> Iterator[Row]:
  pyarrow = _import("pyarrow")
  parquet = _import("pyarrow.parquet")
  columns = list(config.fields or (config.field,))
  try:
    with parquet.ParquetFile(path) as file:
      if columns == [""]:
        rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
        yield from ((n, without_none(row), f"{path} row {n}") for n, row in enumerate(rows))
        return
      for column in columns:
        if column not in file.schema_arrow.names:
          raise _missing_field(path, column, file.schema_arrow.names)
      row = 0
      for batch in file.iter_batches(batch_size=1024, columns=columns):
        # Text as binary, because pyarrow refuses to make a str of bytes that are not UTF-8.
        texts = {name: not config.fields or _is_text(batch.schema.field(name).type) for name in columns}
        values = [
          (batch.column(name).cast(pyarrow.large_binary()) if texts[name] else batch.column(name)).to_pylist()
          for name in columns
        ]
        for fields in zip(*values):
          yield row, dict(zip(columns, fields)), f"{path} row {row}"
          row += 1
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise DataError(f"{path}: not a readable Parquet file of text: {_first_line(error)}") from error


def _is_text(kind: Any) -> bool:
  return str(kind) in ("string", "large_string", "binary", "large_binary")


def _read_python(path: str, relative: str, config: SourceConfig) -> Iterator[Row]:
  with open(path, "rb") as file:
    for row, fields in enumerate(python_functions(file.read(), relative)):
      yield row, fields, f"{path} function {row}"


def _content(row: Any, config: SourceConfig, where: str) -> bytes:
  """A document's bytes: of an example its fields as a JSON list."""
  if not config.fields:
    value = _field(row, config.field, where)
    if not isinstance(value, str | bytes):
      raise DataError(f"{where}: field {config.field!r} must be text, this is {type(value).__name__}")
    return to_bytes(value)
  values = [_field(row, name, where) for name in config.fields]
  plain = [v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values]
  try:
    return json.dumps(plain).encode()
  except TypeError as error:
    raise DataError(f"{where}: an example's fields must be text, numbers or lists of them") from error


def _field(row: Any, field: str, where: str) -> Any:
  if not isinstance(row, dict):
    raise DataError(f"{where}: a JSON object is needed, this is {type(row).__name__}")
  if field not in row:
    raise _missing_field(where, field, row)
  return row[field]


def _missing_field(where: str, field: str, names) -> DataError:
  return DataError(f"{where}: no field {field!r}; set the source's `field` to one of: {', '.join(names)}")


# Libraries


def _import(module: str) -> Any:
  import importlib

  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.split(".")[0]
    raise DataError(f"{package} is not installed: pip install 'jaxllm[data]'") from error


def _first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _open_tfds(config: SourceConfig) -> tuple[Any, str]:
  """Rows of a TFDS dataset: a prepared directory (with dataset_info.json) or a name under TFDS_DATA_DIR."""
  tfds = _import("tensorflow_datasets")
  path = os.path.expanduser(config.path)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      if os.path.isdir(path):
        builder = tfds.builder_from_directory(path)
      else:
        builder = tfds.builder(config.path, file_format="array_record")
        builder.download_and_prepare()
    stamp = _stamp([[str(builder.data_dir), config.split], _directory_facts(str(builder.data_dir))])
    return builder.as_data_source(config.split), stamp
  except Exception as error:  # TFDS raises many kinds for an unknown name, split, format or a failed download
    raise DataError(
      f"cannot open TFDS dataset {config.path!r}, split {config.split!r}: {_first_line(error)}; give a "
      "name that TFDS knows or a directory prepared with file_format='array_record'"
    ) from error


def _open_huggingface(config: SourceConfig) -> tuple[Any, str]:
  """Rows of a directory written by save_to_disk, of a folder of data files, or of a hub name."""
  datasets = _import("datasets")
  path = os.path.expanduser(config.path)
  try:
    if os.path.isdir(path):
      saved = {"state.json", "dataset_dict.json"} & set(os.listdir(path))
      data = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=config.split)
      if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
          raise DataError(f"{path} has no split {config.split!r}; it has: {', '.join(data)}")
        data = data[config.split]
      return data, _stamp([config.split, _directory_facts(path)])
    name, _, subset = config.path.partition(":")
    data = datasets.load_dataset(name, subset or None, split=config.split)
    return data, _stamp([config.path, config.split, data._fingerprint])
  except DataError:
    raise
  except Exception as error:  # the library has no common base for unknown names, splits and broken files
    raise DataError(
      f"cannot open Hugging Face dataset {config.path!r}, split {config.split!r}: {_first_line(error)}; "
      "give a directory from save_to_disk, a folder of data files, or a hub name"
    ) from error


def _directory_facts(root: str) -> list:
  files = sorted(glob.glob("**", root_dir=root, recursive=True, include_hidden=True))
  return [(name, *_stat(os.path.join(root, name))) for name in files if os.path.isfile(os.path.join(root, name))]

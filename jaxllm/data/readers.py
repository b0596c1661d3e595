"""Rows out of files, one reader for each kind of source."""

import collections
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jaxllm.base.errors import DataError
from jaxllm.base.os_errors import file_errors
from jaxllm.data.config import SourceConfig
from jaxllm.data.libraries import first_line, import_library, without_none
from jaxllm.data.paths import File
from jaxllm.data.python_functions import python_functions
from jaxllm.data.streams import COMPRESSED, MOST_BYTES, is_plain, opened
from jaxllm.data.units import Unit, byte_ranges, files_in_groups, unit_bytes

# Its number (of a whole file None), its fields or what is wrong with it, and what errors call it
Row = tuple[int | None, Any, str]
Marks = collections.Counter[str]  # byte order marks that were met
_UNPACKED = 4  # times as many bytes as a packed file has, at a guess


def units_of_files(files: list[File], config: SourceConfig) -> list[Unit]:
  """How files of this kind are cut.

  Raises:
    DataError: one is no readable Parquet file.
  """
  with file_errors("the corpus", kind=DataError):
    packed = [config.kind == "parquet" or file.path.endswith(COMPRESSED) for file in files]
    sizes = [file.size * (_UNPACKED if one else 1) for file, one in zip(files, packed)]
    most = unit_bytes(sum(sizes))

    def split(file: File, size: int) -> list[Unit]:
      if config.kind == "parquet":
        return _row_groups(file, config, most)
      if config.kind == "jsonl" and is_plain(file.path, config.encoding):
        return byte_ranges(file, size, most)
      return [Unit((file,), size=size)]

    return files_in_groups(files, sizes, split)


def rows_of(unit: Unit, config: SourceConfig, marks: Marks) -> Iterator[tuple[str, Any, str]]:
  """What of the key stands behind the source's name, the fields and the place of each row of some files.

  Raises:
    DataError: a file cannot be read or unpacked, or is another one since it was listed.
  """
  for file in unit.files:
    with file_errors(file.path, kind=DataError):
      file.check()
      for row, values, where in _READERS[config.kind](file.path, file.relative, config, unit, marks):
        yield (f"/{file.relative}" if row is None else f"/{file.relative}:{row}"), values, where
      file.check()


def _text(path, relative, config, unit, marks) -> Iterator[Row]:
  with opened(path, config.encoding, marks) as file:
    yield None, {config.field or "text": _whole(file, path)}, path


def _whole(file: Any, path: str) -> bytes:
  parts, size = [], 0
  while data := file.read(1 << 24):
    parts.append(data)
    size += len(data)
    if size > MOST_BYTES:
      raise DataError(
        f"{path} is a document of over {MOST_BYTES >> 20} MiB, which must be in memory at once; split it into several"
      )
  return b"".join(parts)


def _jsonl(path, relative, config, unit, marks) -> Iterator[Row]:
  if unit.stop is None:
    with opened(path, config.encoding, marks) as file:
      yield from _json_lines(file, path, 1, 0, None)
    return
  if unit.start == unit.stop:
    return
  assert unit.first is not None
  with open(path, "rb") as file:
    if unit.start:  # the line that goes on here is that of the unit before
      file.seek(unit.start - 1)
      _line(file, path, unit.first - 1)
    yield from _json_lines(file, path, unit.first, file.tell() if unit.start else 0, unit.stop)


def _line(file: Any, path: str, number: int | str) -> bytes:
  line = file.readline(MOST_BYTES + 1)
  if len(line) > MOST_BYTES:
    raise DataError(f"{path}:{number}: a line of over {MOST_BYTES >> 20} MiB; split it into several")
  return line


def _json_lines(file: Any, path: str, number: int, at: int, stop: int | None) -> Iterator[Row]:
  while (stop is None or at < stop) and (line := _line(file, path, number)):
    at += len(line)
    if number == 1:
      line = line.removeprefix(b"\xef\xbb\xbf")
    if line.strip():
      where = f"{path}:{number}"
      try:
        row = _parsed(line.decode("utf-8", "surrogateescape"))
      except (ValueError, RecursionError) as error:
        row = DataError(f"{where}: not a JSON object: {first_line(error)}; mend or remove the line")
      yield number, row, where
    number += 1


_DECODER = json.JSONDecoder()


def _parsed(text: str) -> Any:
  """`json.loads`, faster where nothing but a line's end stands behind the value."""
  try:
    value, end = _DECODER.raw_decode(text)
  except ValueError:
    return json.loads(text)
  return json.loads(text) if text[end:].strip(" \t\r\n") else value


def _json(path, relative, config, unit, marks) -> Iterator[Row]:
  """The objects of a list, each by the line on which it begins."""
  with opened(path, config.encoding, marks) as file:
    text = _whole(file, path).decode("utf-8", "surrogateescape")
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
      raise DataError(f"{path}:{line}: not a JSON list of objects: {first_line(error)}; mend it") from error
    yield row, value, f"{path}:{line}"
    line += text.count("\n", space.end(), at)
    row += 1
  if rest := text[space.end() + 1 :].strip():
    line += text.count("\n", 0, text.index(rest[0], space.end() + 1)) - text.count("\n", 0, space.end())
    raise DataError(f"{path}:{line}: {rest[:20]!r} stands behind the JSON list's end; remove it")


def _row_groups(file: File, config: SourceConfig, most: int) -> list[Unit]:
  """Neighbouring row groups of a Parquet file, together up to `most` bytes."""
  pyarrow, parquet = import_library("pyarrow"), import_library("pyarrow.parquet")
  try:
    with parquet.ParquetFile(file.path) as opened_file:
      facts = opened_file.metadata
      groups = [(facts.row_group(n).num_rows, facts.row_group(n).total_byte_size) for n in range(facts.num_row_groups)]
  except pyarrow.ArrowException as error:
    raise _not_parquet(file.path, error) from error
  units, start, held, row, first = [], 0, 0, 0, 0
  for number, (rows, size) in enumerate(groups):
    if number > start and held + size > most:
      units.append(Unit((file,), start, number, first, held))
      start, held, first = number, 0, row
    held += size
    row += rows
  return [*units, Unit((file,), start, len(groups), first, held)]


def _not_parquet(path: str, error: BaseException) -> DataError:
  return DataError(f"{path}: not a readable Parquet file of text: {first_line(error)}")


def _parquet(path, relative, config, unit, marks) -> Iterator[Row]:
  pyarrow = import_library("pyarrow")
  parquet = import_library("pyarrow.parquet")
  columns = list(config.fields) or [config.field] * bool(config.field)  # none: whole rows
  row = unit.first
  try:
    with parquet.ParquetFile(path) as file:
      groups = None if unit.stop is None else list(range(unit.start, unit.stop))
      for column in columns:
        if column not in file.schema_arrow.names:
          raise DataError(f"{path}: {no_field(column, file.schema_arrow.names)}")
      for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=columns or None):
        rows: Iterable[Any]
        if columns:
          # Text as binary, because pyarrow refuses to make a str of bytes that are not UTF-8.
          texts = [not config.fields or _is_text(batch.schema.field(name).type) for name in columns]
          values = [_binary(batch.column(n), pyarrow) if text else batch.column(n) for n, text in zip(columns, texts)]
          rows = (dict(zip(columns, fields)) for fields in zip(*(column.to_pylist() for column in values)))
        else:
          rows = map(without_none, batch.to_pylist())
        for fields in rows:
          yield row, fields, f"{path} row {row}"
          row += 1
  except (pyarrow.ArrowException, UnicodeDecodeError) as error:
    raise _not_parquet(path, error) from error


def _binary(column: Any, pyarrow: Any) -> Any:
  """Text of any of Arrow's kinds, categories and views too, as bytes."""
  if pyarrow.types.is_dictionary(column.type):
    column = column.dictionary_decode()
  if str(column.type).endswith("_view"):
    column = column.cast(pyarrow.large_string() if "string" in str(column.type) else pyarrow.large_binary())
  return column.cast(pyarrow.large_binary())


def _is_text(kind: Any) -> bool:
  kind = getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind
  return str(kind).removesuffix("_view") in ("string", "large_string", "binary", "large_binary")


def _python(path, relative, config, unit, marks) -> Iterator[Row]:
  with opened(path, config.encoding, marks) as file:
    for row, fields in enumerate(python_functions(_whole(file, path), relative)):
      yield row, fields, f"{path} function {row}"


_READERS = {"text": _text, "jsonl": _jsonl, "json": _json, "parquet": _parquet, "python": _python}


def no_field(field: str, names: Any) -> str:
  return f"no field {field!r}; set the source's `field` to one of: {', '.join(map(str, names))}"

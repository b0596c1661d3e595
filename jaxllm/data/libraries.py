"""Data sets of TFDS and Hugging Face: opened, cut into units, read by row."""

import contextlib
import glob
import hashlib
import importlib
import io
import json
import os
from collections.abc import Iterator
from typing import Any

from jaxllm.base.errors import DataError
from jaxllm.data.config import SourceConfig
from jaxllm.data.paths import file_facts
from jaxllm.data.units import Unit, row_ranges

_ROW_BYTES = 2048  # of a row of which nobody knows


class Library:
  """An opened data set of `kind` "tfds" or "huggingface"; `stamp` changes when it (probably) did."""

  def __init__(self, config: SourceConfig):
    """Raises DataError where there is none of this name, or its library is not installed."""
    self._config = config
    self.rows, self.stamp = (_open_tfds if config.kind == "tfds" else _open_huggingface)(config)

  def units(self) -> list[Unit]:
    if self._config.streaming:
      shards = int(getattr(self.rows, "num_shards", None) or self.rows.n_shards)  # as older versions call it
      return [Unit((), shard, shards, 0) for shard in range(shards)]
    table = getattr(getattr(self.rows, "data", None), "nbytes", None)
    return row_ranges(len(self.rows), table or _ROW_BYTES * len(self.rows))

  def read(self, unit: Unit) -> Iterator[tuple[str, Any, str]]:
    """Key behind the source's name, fields and place of each row."""
    config = self._config
    kept = (lambda row: row) if config.field or config.fields else without_none
    try:
      if config.streaming:
        assert unit.stop is not None
        part = self.rows.shard(unit.stop, unit.start) if unit.stop > 1 else self.rows
        for row, example in enumerate(part):
          yield f":{unit.start}:{row}", kept(example), f"{config.path} part {unit.start} row {row}"
        return
      row = unit.start
      for row in range(unit.start, len(self.rows) if unit.stop is None else unit.stop):
        yield f":{row}", kept(self.rows[row]), f"{config.path} row {row}"
    except (DataError, GeneratorExit):
      raise
    except Exception as error:  # whatever the library raises for a damaged record
      raise DataError(f"cannot read {config.path} near row {row}: {first_line(error)}") from error


def import_library(module: str) -> Any:
  """Raises DataError when it is not installed."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.split(".")[0]
    raise DataError(f"{package} is not installed: pip install 'jaxllm[data]'") from error


def without_none(value: Any) -> Any:
  """Without the keys that Arrow gives to all objects of a column because one of them has it."""
  if isinstance(value, dict):
    return {name: without_none(item) for name, item in value.items() if item is not None}
  return [without_none(item) for item in value] if isinstance(value, list) else value


def first_line(error: BaseException) -> str:
  return next(iter(str(error).strip().splitlines()), type(error).__name__)


def stamp_of(facts: Any) -> str:
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _open_tfds(config: SourceConfig) -> tuple[Any, str]:
  """Rows of a TFDS dataset: a prepared directory (with dataset_info.json) or a name under TFDS_DATA_DIR."""
  tfds = import_library("tensorflow_datasets")
  path = os.path.expanduser(config.path)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      if os.path.isdir(path):
        builder = tfds.builder_from_directory(path)
      else:
        builder = tfds.builder(config.path, file_format="array_record")
        builder.download_and_prepare()
    stamp = stamp_of([[str(builder.data_dir), config.split], _directory_facts(str(builder.data_dir))])
    return builder.as_data_source(config.split), stamp
  except Exception as error:  # TFDS raises many kinds for an unknown name, split, format or a failed download
    raise DataError(
      f"cannot open TFDS dataset {config.path!r}, split {config.split!r}: {first_line(error)}; give a "
      "name that TFDS knows or a directory prepared with file_format='array_record'"
    ) from error


def _open_huggingface(config: SourceConfig) -> tuple[Any, str]:
  """Rows of a directory written by save_to_disk, of a folder of data files, or of a hub name; or a stream of them."""
  datasets = import_library("datasets")
  path = os.path.expanduser(config.path)
  stream = {"streaming": True} if config.streaming else {}
  try:
    if os.path.isdir(path):
      saved = {"state.json", "dataset_dict.json"} & set(os.listdir(path))
      data = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, split=config.split, **stream)
      if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
          raise DataError(f"{path} has no split {config.split!r}; it has: {', '.join(data)}")
        data = data[config.split]
      if config.streaming and isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset()
      return data, stamp_of([config.split, _directory_facts(path)])
    name, _, subset = config.path.partition(":")
    data = datasets.load_dataset(name, subset or None, split=config.split, **stream)
    return data, stamp_of([config.path, config.split, getattr(data, "_fingerprint", None) or str(data.info.version)])
  except DataError:
    raise
  except Exception as error:  # the library has no common base for unknown names, splits and broken files
    raise DataError(
      f"cannot open Hugging Face dataset {config.path!r}, split {config.split!r}: {first_line(error)}; "
      "give a directory from save_to_disk, a folder of data files, or a hub name"
    ) from error


def _directory_facts(root: str) -> list:
  files = sorted(glob.glob("**", root_dir=root, recursive=True, include_hidden=True))
  return [(name, *file_facts(os.path.join(root, name))) for name in files if os.path.isfile(os.path.join(root, name))]

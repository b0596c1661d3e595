"""JSON from strangers: read within bounds, and taken by declared types.

A file is declared as a `TypedDict` (`total=False`) whose annotations are what `jaxllm.base.settings.convert` knows;
`declared` gives back the keys that it names, each of its type, and nothing else. `Whole` and `Real` take numbers that
are written as text or as another kind of number, where they are exact ("32", 32.0).
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from jaxllm.base.errors import CheckpointError, ConfigError, UserError, shown
from jaxllm.base.files import regular
from jaxllm.base.os_errors import file_errors
from jaxllm.base.ranges import Range
from jaxllm.base.settings import from_declared

MAX_BYTES = 1 << 24  # of a JSON file
MAX_DEPTH = 64
BIG = 2**31 - 1
_STRINGS, _BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL), re.compile(r"[][{}]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Whole = Annotated[int, Range(-BIG, BIG)]
Count = Annotated[int, Range(0, BIG)]
Size = Annotated[int, Range(1, BIG)]
Layers = Annotated[int, Range(1, 4096)]  # of which there are loops, so the largest is one that a model may have
Real = Annotated[float, Range(-1e30, 1e30)]
NotNegative = Annotated[float, Range(0, 1e30)]
Positive = Annotated[float, Range(1e-30, 1e30)]


def read_json(path: Path, max_bytes: int = MAX_BYTES, error: type[UserError] = CheckpointError) -> dict[str, Any]:
  """The object in a JSON file; see `parse_json`.

  Raises:
    error: no such file, it cannot be read, is larger than `max_bytes`, or has no object in it.
  """
  if not os.path.lexists(path):
    raise error(f"{path.parent} has no {path.name}")
  with file_errors(path, kind=error):
    if regular(path).stat().st_size > max_bytes:
      raise error(f"cannot read {path}: it has {path.stat().st_size} bytes, and at most {max_bytes} make sense")
    data = path.read_bytes()
  value = parse_json(data, str(path), error)
  if not isinstance(value, dict):
    raise error(f"{path} holds no JSON object")
  return value


def parse_json(data: bytes | str, what: str, error: type[UserError] = CheckpointError) -> Any:
  """The value that a JSON text spells; a byte order mark before it is passed over.

  Args:
    what: has the text, for messages.

  Raises:
    error: it is not UTF-8 or not JSON, is nested deeper than `MAX_DEPTH`, names a key twice, or has a number that JSON
      has not (NaN, Infinity, 1e999) or half a character.
  """
  try:
    text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
    _check_depth(text)
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    if _SURROGATE.search(text):
      json.dumps(value, ensure_ascii=False).encode()  # halves of characters cannot be encoded
    return value
  except UnicodeDecodeError:
    raise error(f"cannot read {what}: it is not UTF-8") from None
  except UnicodeEncodeError:
    raise error(f"cannot read {what}: it holds half of a character") from None
  except (ValueError, RecursionError) as problem:
    raise error(f"cannot read {what}: it is not JSON: {problem}") from None


def declared(kind: Any, values: Mapping[str, Any], what: str, error: type[UserError] = ConfigError) -> dict[str, Any]:
  """What a TypedDict names of a mapping, each value of its declared type; other keys are left out.

  A null where the type has no None counts as absent.

  Raises:
    error: a value is of another type or outside its range; the message names `what` and the key.
  """
  try:
    return from_declared(kind, values)
  except ConfigError as problem:
    raise error(f"{what}: {str(problem).removeprefix('config ')}") from None


def _check_depth(text: str) -> None:
  """Counts brackets outside strings, before anything is parsed."""
  if text.count("[") + text.count("{") <= MAX_DEPTH:
    return
  depth = 0
  for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):
    depth += 1 if bracket in "[{" else -1
    if depth > MAX_DEPTH:
      raise ValueError(f"it is nested deeper than {MAX_DEPTH}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  table: dict[str, Any] = {}
  for name, value in pairs:
    if name in table:
      raise ValueError(f"the name {shown(name)} stands in it twice")
    table[name] = value
  return table


def _no_number(text: str) -> float:
  raise ValueError(f"{text} is no number in it")


def _finite(text: str) -> float:
  value = float(text)
  if value in (float("inf"), float("-inf")):
    raise ValueError(f"{text[:20]} is too large for a number")
  return value

"""Mappings become typed dataclasses: config files, command lines and the JSON of strangers, by their declared types.

A field's annotation says what it takes: bool, int, float, str, `Literal[...]`, another dataclass, `tuple[T, ...]`,
`dict[str, T]`, `T | None`. A union of dataclasses is a *tagged group*: each of them has a class attribute `name`, the
mapping's "name" chooses among them, and its other keys are that class's fields. ("kind" can stand for "name".)
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from jaxllm.base import ranges
from jaxllm.base.errors import ConfigError, shown

TAGS = ("name", "kind")  # a group uses one of them


class Text(str):
  """A value as typed on a command line, read as whatever type its field has."""


def from_mapping(cls: type, values: Any, path: str = "") -> Any:
  """An instance of the dataclass `cls` from a mapping of its fields; what is left out takes its default.

  Args:
    path: the dotted key under which the mapping stands, for messages.

  Raises:
    ConfigError: an unknown key or a value of another type, named in one line.
  """
  if isinstance(values, cls):
    return values
  if not isinstance(values, Mapping):
    raise ConfigError(f"config {path or 'file'} is {shown(values)}; it should be a group of keys")
  hints = field_types(cls)
  kwargs = {}
  for name in values:
    full = f"{path}.{name}" if path else f"{name}"
    if name not in hints:
      near = _near(name, hints)
      hint = f"did you mean {path + '.' if path else ''}{near[0]}?" if near else f"known: {', '.join(hints) or 'none'}"
      raise ConfigError(f"unknown config key {full}; {hint}")
    kwargs[name] = convert(hints[name], values[name], full)
  ranges.check(cls, kwargs, path)
  return cls(**kwargs)


def from_declared(kind: Any, values: Any, path: str = "") -> dict[str, Any]:
  """The keys of a mapping that a TypedDict declares, each of its type; others are left out.

  A null counts as absent where the type has no None.

  Raises:
    ConfigError: a value of another type, named in one line.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(f"config key {path} is {shown(values)}; it should be a group of keys")
  hints = typing.get_type_hints(kind, include_extras=True)
  found = {
    name: convert(hints[name], value, f"{path}.{name}" if path else name)
    for name, value in values.items()
    if name in hints and (value is not None or type(None) in typing.get_args(hints[name]))
  }
  if lacking := sorted(kind.__required_keys__ - found.keys()):
    raise ConfigError(f"config key {path} lacks {lacking[0]!r}")
  return found


def field_types(cls: type) -> dict[str, Any]:
  """Field name -> its type, of a dataclass."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def convert(kind: Any, value: Any, path: str) -> Any:
  """`value` as the type `kind`.

  Raises:
    ConfigError: it is none; the message names the key `path`.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if type(None) in args and (value is None or (isinstance(value, Text) and value.lower() == "none")):
      return None
    others = [a for a in args if a is not type(None)]
    if len(others) > 1 and not dataclasses.is_dataclass(others[0]):
      return _one_of(others, value, path)
    return _tagged(others, parse(value), path) if len(others) > 1 else convert(others[0], value, path)
  if dataclasses.is_dataclass(kind):
    return from_mapping(typing.cast(type, kind), parse(value), path)
  if origin in (typing.Required, typing.NotRequired):
    return convert(args[0], value, path)
  if origin is Annotated:
    number = convert(args[0], _number(value) if isinstance(value, str) else value, path)
    if not args[1].holds(number):
      raise ConfigError(f"config key {path} is {shown(value)}; it must {args[1].wish(number)}")
    return number
  if typing.is_typeddict(kind):
    return from_declared(kind, value, path)
  if origin is tuple:
    return _tuple(args, value, path)
  if origin is list:
    return list(_tuple(args, value, path))
  if origin is dict:
    value = parse(value)
    if not isinstance(value, Mapping):
      raise ConfigError(f"config key {path} is {shown(value)}; it should be a mapping from names to values")
    return {str(name): convert(args[1], item, f"{path}.{name}") for name, item in value.items()}
  if kind is Any:
    return parse(value)
  if origin is Literal:
    value = str(value) if isinstance(value, Text) else value
    if value not in args:
      near = _near(value, map(str, args))
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"config key {path} is {shown(value)}; choose one of {', '.join(map(repr, args))}{hint}")
    return value
  if kind is str:
    if not isinstance(value, str):
      raise ConfigError(f"config key {path} is {shown(value)}; it should be a string")
    return str(value)
  value = parse(value)
  number = isinstance(value, int | float) and not isinstance(value, bool)
  if kind is bool and isinstance(value, bool):
    return value
  if kind is int and number and (isinstance(value, int) or value.is_integer()):
    return int(value)
  if kind is float and number and (abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value)):
    return float(value)
  names = {bool: "true or false", int: "a whole number", float: "a number"}
  raise ConfigError(f"config key {path} is {shown(value)}; it should be {names.get(kind, kind)}")


def _tuple(args: tuple, value: Any, path: str) -> tuple:
  parsed = parse(value)
  if isinstance(value, Text) and isinstance(parsed, str) and args[0] is str:
    parsed = [parsed]
  if not isinstance(parsed, list | tuple):
    raise ConfigError(f"config key {path} is {shown(parsed)}; it should be a list")
  return tuple(convert(args[0], item, f"{path}.{i}") for i, item in enumerate(parsed))


def _near(name: Any, known: Iterable[str]) -> list[str]:
  return difflib.get_close_matches(name[:80], list(known), n=1) if isinstance(name, str) else []


def _number(text: str) -> Any:
  """The number that a text spells; else the text."""
  for kind in (int, float):
    try:
      return kind(text) if len(text) < 40 else text
    except ValueError:
      pass
  return text


def _one_of(kinds: list[Any], value: Any, path: str) -> Any:
  """The value as the first of these types that takes it."""
  for kind in kinds[:-1]:
    try:
      return convert(kind, value, path)
    except ConfigError:
      pass
  return convert(kinds[-1], value, path)


def _tagged(classes: list[Any], values: Any, path: str) -> Any:
  """An instance of that one of `classes` whose name the mapping gives; by default the first."""
  if isinstance(values, tuple(classes)):
    return values
  tag = tag_of(classes[0])
  if not isinstance(values, Mapping):
    raise ConfigError(f"config {path} is {shown(values)}; it should be a group of keys with a {tag}")
  by_name = {getattr(cls, tag): cls for cls in classes}
  name = values.get(tag, next(iter(by_name)))
  name = str(name) if isinstance(name, str) else name
  if not isinstance(name, str) or name not in by_name:
    near = _near(name, by_name)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"config key {path}.{tag} is {shown(name)}; choose one of {', '.join(map(repr, by_name))}{hint}")
  cls, rest = by_name[name], {key: value for key, value in values.items() if key != tag}
  for key in rest:
    if key not in field_types(cls):
      owners = [owner for owner, other in by_name.items() if key in field_types(other)]
      if owners:
        owner = " or ".join(map(repr, owners))
        raise ConfigError(f"config key {path}.{key} belongs to {path}.{tag} {owner}, not to {name!r}")
  return from_mapping(cls, rest, path)


def parse(value: Any) -> Any:
  """A command-line text as a Python literal where it is one; any other value as it is."""
  if not isinstance(value, Text):
    return value
  if value.lower() in ("true", "false", "none"):
    return {"true": True, "false": False, "none": None}[value.lower()]
  try:
    return ast.literal_eval(value)
  except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
    return value


def to_mapping(settings: Any) -> dict[str, Any]:
  """The inverse of `from_mapping`: nested dicts of JSON values, each tagged group with its name."""
  values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
  return tag_and_name(type(settings)) | {key: _plain(value) for key, value in values.items()}


def tag_of(cls: type) -> str:
  """The key that chooses among the classes of a tagged group, "" for a class of none: its value is the class's and no
  field's."""
  return next((tag for tag in TAGS if isinstance(getattr(cls, tag, None), str) and tag not in field_types(cls)), "")


def tag_and_name(cls: type) -> dict[str, str]:
  """{tag: the class's value of it}; {} for a class of no tagged group."""
  tag = tag_of(cls)
  return {tag: getattr(cls, tag)} if tag else {}


def _plain(value: Any) -> Any:
  if dataclasses.is_dataclass(value):
    return to_mapping(value)
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return value


def keys(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Every (dotted key, value) of a dataclass of settings."""
  for tag, name in tag_and_name(type(settings)).items():
    yield f"{prefix}{tag}", name
  for field in dataclasses.fields(settings):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(value):
      yield from keys(value, f"{prefix}{field.name}.")
    else:
      yield f"{prefix}{field.name}", value

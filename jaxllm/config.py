"""From a config file to one frozen, validated `RunConfig`; nothing else in the package sees a ConfigDict."""

import ast
import dataclasses
import difflib
import importlib.util
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from jaxllm.errors import ConfigError
from jaxllm.training.config import RunConfig


def default_config() -> ConfigDict:
  """A ConfigDict with every key there is at its default; a config file changes what it needs."""
  return _defaults(RunConfig)


def to_config_dict(config: Any) -> ConfigDict:
  """A dataclass of settings, such as a model preset, as a ConfigDict."""
  values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
  return ConfigDict(
    {k: to_config_dict(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}, type_safe=False
  )


def _defaults(cls: type) -> ConfigDict:
  # The fields' defaults and not a default instance's values: sizes that an instance derives stay open.
  values = {f.name: f.default for f in dataclasses.fields(cls)}
  return ConfigDict(
    {k: _defaults(type(v)) if dataclasses.is_dataclass(v) else v for k, v in values.items()}, type_safe=False
  )


def resolve(config: Mapping[str, Any]) -> RunConfig:
  """The frozen form of a config; groups and keys that it leaves out take their defaults.

  Raises:
    ConfigError: an unknown key, a wrong type or an impossible combination, named in one line.
  """
  return _build(RunConfig, config, "")


def load_config_file(path: str) -> types.ModuleType:
  """Runs a config file and returns its module, which has `get_config()` and perhaps `sweep(add)`.

  Raises:
    ConfigError: no such file, it does not run, or it has no `get_config`.
  """
  file = Path(path)
  if not file.is_file():
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
    hint = f"; did you mean {file.parent / near[0]}?" if near else ""
    raise ConfigError(f"no config file {path}{hint}")
  spec = importlib.util.spec_from_file_location(f"jaxllm_config_{file.stem}", file)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ConfigError(f"{path} does not run: {type(error).__name__}: {error}") from error
  if not callable(getattr(module, "get_config", None)):
    raise ConfigError(f"{path} has no function get_config() that returns a ConfigDict")
  return module


def load_config(path: str, overrides: Iterable[tuple[str, Any]] = ()) -> RunConfig:
  """The RunConfig of a config file with (dotted key, value) overrides; string values are parsed."""
  module = load_config_file(path)
  try:
    config = module.get_config()
  except ConfigError:
    raise
  except Exception as error:
    raise ConfigError(f"{path}: get_config() fails: {type(error).__name__}: {error}") from error
  if not isinstance(config, Mapping | ConfigDict):
    raise ConfigError(f"{path}: get_config() returns a {type(config).__name__}, not a ConfigDict")
  tree = _plain(config)
  for key, value in overrides:
    _override(tree, key, value)
  return resolve(tree)


def sweep_points(path: str) -> list[dict[str, Any]]:
  """The points that a config file's `sweep(add)` adds: dicts from dotted keys to values."""
  sweep: Callable | None = getattr(load_config_file(path), "sweep", None)
  if sweep is None:
    raise ConfigError(f"{path} has no function sweep(add); define one, or leave --sweep out")
  points: list[dict[str, Any]] = []

  def add(point: Mapping[str, Any] | None = None, **keys):
    point = {**(point or {}), **keys}
    points.append({key.removeprefix("config."): value for key, value in point.items()})

  sweep(add)
  if not points:
    raise ConfigError(f"{path}: sweep(add) added no point")
  return points


def _plain(config: Any) -> Any:
  if isinstance(config, ConfigDict):
    config = {key: config[key] for key in config}
  if isinstance(config, Mapping):
    return {key: _plain(value) for key, value in config.items()}
  if isinstance(config, list | tuple):
    return [_plain(value) for value in config]
  if dataclasses.is_dataclass(config):
    return _plain({f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
  return config


def _override(tree: dict, key: str, value: Any) -> None:
  """Sets a dotted key; numbers index lists ("data.sources.0.path")."""
  *parents, last = key.split(".")
  node = tree
  for i, name in enumerate(parents):
    if isinstance(node, list):
      if not name.isdigit() or int(name) >= len(node):
        raise ConfigError(f"config key {key}: {'.'.join(parents[:i])} has {len(node)} entries, no {name!r}")
      node = node[int(name)]
      continue
    if node.get(name) is None:
      node[name] = {}
    node = node[name]
    if not isinstance(node, dict | list):
      raise ConfigError(f"config key {key}: {'.'.join(parents[: i + 1])} is a value, not a group")
  if isinstance(node, list):
    node[int(last)] = value
  else:
    node[last] = _Text(value) if isinstance(value, str) else value


class _Text(str):
  """A value as typed on the command line, read as whatever type its key has."""


def _build(cls: type, values: Any, path: str) -> Any:
  """An instance of the dataclass `cls` from a mapping of its fields."""
  if isinstance(values, cls):
    values = {f.name: getattr(values, f.name) for f in dataclasses.fields(cls)}
  if not isinstance(values, Mapping | ConfigDict):
    raise ConfigError(f"config {path or 'file'} is {values!r}; it should be a group of keys")
  hints = typing.get_type_hints(cls)
  kwargs = {}
  for name in values:
    full = f"{path}.{name}" if path else name
    if name not in hints:
      near = difflib.get_close_matches(str(name), hints, n=1)
      hint = f"did you mean {path + '.' if path else ''}{near[0]}?" if near else f"known: {', '.join(hints)}"
      raise ConfigError(f"unknown config key {full}; {hint}")
    kwargs[name] = _convert(hints[name], values[name], full)
  return cls(**kwargs)


def _convert(kind: Any, value: Any, path: str) -> Any:
  """`value` as the type `kind`, or a ConfigError that names the key."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if value is None or (isinstance(value, _Text) and value.lower() == "none"):
      return None
    return _convert(next(a for a in args if a is not type(None)), value, path)
  if dataclasses.is_dataclass(kind):
    return _build(kind, _parsed(value), path)
  if origin is tuple:
    value = _parsed(value)
    if isinstance(value, str) and args[0] is str and isinstance(value, _Text):
      value = [value]
    if not isinstance(value, list | tuple):
      raise ConfigError(f"config key {path} is {value!r}; it should be a list")
    return tuple(_convert(args[0], item, f"{path}.{i}") for i, item in enumerate(value))
  if origin is Literal:
    value = str(value) if isinstance(value, _Text) else value
    if value not in args:
      near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"config key {path} is {value!r}; choose one of {', '.join(map(repr, args))}{hint}")
    return value
  if kind is str:
    if not isinstance(value, str):
      raise ConfigError(f"config key {path} is {value!r}; it should be a string")
    return str(value)
  value = _parsed(value)
  if kind is bool and isinstance(value, bool):
    return value
  if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
    return int(value)
  if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
    return float(value)
  names = {bool: "true or false", int: "a whole number", float: "a number"}
  raise ConfigError(f"config key {path} is {value!r}; it should be {names.get(kind, kind)}")


def _parsed(value: Any) -> Any:
  """A command-line text as a Python literal where it is one."""
  if not isinstance(value, _Text):
    return value
  if value.lower() in ("true", "false", "none"):
    return {"true": True, "false": False, "none": None}[value.lower()]
  try:
    return ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return value

"""From a config file to one frozen, validated `RunConfig`; nothing else in the package sees a ConfigDict."""

import dataclasses
import difflib
import importlib.util
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxllm.base import settings
from jaxllm.base.errors import ConfigError
from jaxllm.training.config import MOVED, RunConfig


def default_config() -> ConfigDict:
  """A ConfigDict with every key there is at its default; a config file changes what it needs.

  A group whose keys depend on its name (objective, say) has only the name.
  """
  return _defaults(RunConfig)


def to_config_dict(config: Any) -> ConfigDict:
  """A dataclass of settings, such as a model preset, as a ConfigDict."""
  tag = settings.tag_and_name(type(config))
  return _config_dict(tag | {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, to_config_dict)


def _defaults(cls: type) -> ConfigDict:
  # The fields' defaults and not a default instance's values: sizes that an instance derives stay open.
  if tag := settings.tag_and_name(cls):
    return ConfigDict(tag, type_safe=False)
  values = {
    f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
    for f in dataclasses.fields(cls)
  }
  return _config_dict(values, lambda value: _defaults(type(value)))


def _config_dict(values: dict[str, Any], group: Callable) -> ConfigDict:
  return ConfigDict({k: group(v) if dataclasses.is_dataclass(v) else v for k, v in values.items()}, type_safe=False)


def resolve(config: Mapping[str, Any]) -> RunConfig:
  """The frozen form of a config; groups and keys that it leaves out take their defaults.

  Raises:
    ConfigError: an unknown key, a wrong type or an impossible combination, named in one line.
  """
  tree = _plain(config)
  for old, new in MOVED.items():
    group, key = old.split(".")
    values = settings.parse(tree.get(group))
    if isinstance(values, Mapping) and key in values:
      raise ConfigError(f"config key {old} is called {new} now")
  return settings.from_mapping(RunConfig, tree)


def load_config_file(path: str) -> types.ModuleType:
  """Runs a config file and returns its module, which has `get_config()` and perhaps `sweep(add)`.

  Raises:
    ConfigError: no such file, it does not run, or it has no `get_config`.
  """
  file = Path(path)
  if not file.is_file():
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=1)
    hint = f"; did you mean {file.parent / near[0]}?" if near else ""
    raise ConfigError(f"no config file {path or repr(path)}{hint}")
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

  try:
    sweep(add)
  except Exception as error:
    raise ConfigError(f"{path}: sweep(add) fails: {type(error).__name__}: {error}") from error
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
  return _plain(to_config_dict(config)) if dataclasses.is_dataclass(config) else config


def _override(tree: dict, key: str, value: Any) -> None:
  """Sets a dotted key; numbers index lists ("data.sources.0.path")."""
  *parents, last = key.split(".")
  node: Any = tree
  for i, name in enumerate(parents):
    if isinstance(node, list):
      node = node[_index(node, name, key)]
      continue
    if node.get(name) is None:
      node[name] = {}
    node = node[name]
    if not isinstance(node, dict | list):
      raise ConfigError(f"config key {key}: {'.'.join(parents[: i + 1])} is a value, not a group")
  node[_index(node, last, key) if isinstance(node, list) else last] = (
    settings.Text(value) if isinstance(value, str) else value
  )


def _index(entries: list, name: str, key: str) -> int:
  if not name.isdecimal() or int(name) >= len(entries):
    raise ConfigError(f"config key {key}: the list has {len(entries)} entries, no {name!r}")
  return int(name)

"""What a way of fine-tuning is: one frozen dataclass whose fields are its settings."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
from jaxtyping import PyTree

from jaxllm.base import patterns
from jaxllm.base.errors import ConfigError
from jaxllm.models.weights import is_adapted, map_weights_with_path, path_key, trained_parts

ALL_LINEAR = "all-linear"
Parts = Mapping[str, Any]  # arrays by the names of a weight's parts


class Peft:
  """The base of all ways. A subclass is a frozen dataclass in a file of its own and an entry of `registry.AnyPeft`."""

  kind: ClassVar[str]  # peft.kind
  adapters_only: ClassVar[bool] = True  # whether nothing but what it adds, and what it `saves`, is trained

  def check(self, params: PyTree) -> None:
    """That its settings fit a model's parameters, which may be shapes. Raises ConfigError where they do not."""

  def wraps(self, module: str) -> bool:
    """Whether it changes the matrix of a module, like "blocks/attention/query"."""
    raise NotImplementedError

  def saves(self, path: str) -> bool:
    """Whether a parameter is trained as it is, beside adapters."""
    return False

  def keeps(self, path: str) -> bool:
    """Whether what the adapter of a parameter begins with is worth a place in files: it is dear to compute."""
    return False

  def wrap(self, module: str, w: Any, key: jax.Array, kept: Parts) -> Any:
    """The weight that takes the place of a module's weight `w`.

    Args:
      kept: what `keep` gave for it; {}: it is computed now.
    """
    raise NotImplementedError

  def lr_scale(self, path: str, matrix: bool, learning_rate: float) -> float:
    """How many times as fast as `learning_rate` an array learns; path: of the array, parts of a weight included."""
    return 1.0

  def adapt(
    self,
    params: PyTree,
    key: jax.Array,
    kept: Mapping[str, Parts] = {},
    leave: Callable[[str], bool] = lambda path: False,
  ) -> PyTree:
    """The parameters with this way's weights in place of those that it changes.

    Args:
      key: for fresh weights. kept: parts by path, see `wrap`.
      leave: paths of parameters that are left alone in any case.
    """

    def one(path, w):
      module = module_of(path)
      if module is None or leave(path) or not self.wraps(module):
        return w
      return self.wrap(module, w, path_key(key, path), kept.get(path, {}))

    return map_weights_with_path(one, params)

  def trained(self, params: PyTree, also: Callable[[str], bool] = lambda path: False) -> PyTree[bool]:
    """A tree of bools like `adapt`'s result: which arrays are trained.

    Args:
      also: paths of parameters that are trained in any case.
    """

    def one(path, w):
      ours = not self.adapters_only or is_adapted(w) or self.saves(path) or also(path)
      return trained_parts(w) if ours else jax.tree.map(lambda _: False, w)

    return map_weights_with_path(one, params)


@dataclasses.dataclass(frozen=True)
class Full(Peft):
  """No adapters: all that is not quantized is trained."""

  kind: ClassVar[str] = "full"
  adapters_only: ClassVar[bool] = False

  def wraps(self, module: str) -> bool:
    return False


def module_of(path: str) -> str | None:
  """The module whose matrix a parameter is, like "blocks/attention/query" or "embedding/tokens"; None: it is none."""
  if path.endswith("/weight"):
    return path.removesuffix("/weight")
  return path if is_table(path) else None


def is_table(module: str) -> bool:
  """Whether a module is a table of vectors, of which rows are taken."""
  return module.split("/")[-2:-1] == ["embedding"]


def paths_of(params: PyTree) -> list[str]:
  """The paths of all parameters."""
  paths: list[str] = []
  map_weights_with_path(lambda path, w: paths.append(path), params)
  return paths


def is_linear(module: str) -> bool:
  """Whether a module is one of the matrices in the layers: not a router, a head or an embedding."""
  return "blocks" in module.split("/") and not re.search(r"norm|router$", module)


def matches(target: str, module: str) -> bool:
  """Whether a target means a module: "all-linear", the end of its path, or a regular expression for all of it."""
  if target == ALL_LINEAR:
    return is_linear(module)
  return f"/{module}".endswith(f"/{target}") or patterns.matches(target, module)


def has(target: str, path: str) -> bool:
  """Whether a target means one of the modules that a parameter is in."""
  names = path.split("/")
  return any(matches(target, "/".join(names[:i])) for i in range(1, len(names) + 1))


def check_targets(key: str, targets: Iterable[str], names: list[str], match: Callable = matches) -> None:
  """That every target of a config's key means something.

  Args:
    names: what there is: modules, or paths with `has` as `match`.

  Raises:
    ConfigError: one does not, is no regular expression, or takes too long to match.
  """
  targets = list(targets)
  patterns.prepare(key, [target for target in targets if target != ALL_LINEAR], names)
  for target in targets:
    if not any(match(target, name) for name in names):
      raise ConfigError(f"{key}: {target!r} matches no module; there are {', '.join(names)}")

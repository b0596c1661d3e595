"""What a way of fine-tuning is: one frozen dataclass whose fields are its settings."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
from jaxtyping import PyTree

from jaxllm.base.errors import ConfigError
from jaxllm.models.weights import map_weights_with_path, path_key, trained_parts

ALL_LINEAR = "all-linear"


class Peft:
  """The base of all ways. A subclass is a frozen dataclass in a file of its own and an entry of `registry.AnyPeft`."""

  kind: ClassVar[str]  # peft.kind
  adapters_only: ClassVar[bool] = True  # whether nothing but what it adds is trained

  def wraps(self, module: str) -> bool:
    """Whether it changes the matrix of a module, like "blocks/attention/query"."""
    raise NotImplementedError

  def wrap(self, w: Any, key: jax.Array) -> Any:
    """The weight that takes the place of the weight `w`."""
    raise NotImplementedError

  def adapt(self, params: PyTree, key: jax.Array) -> PyTree:
    """The parameters with this way's weights in place of those that it changes; the key is for fresh ones."""
    return map_weights_with_path(lambda path, w: self._adapted(path, w, key), params)

  def _adapted(self, path, w, key):
    module = path.removesuffix("/weight")
    return self.wrap(w, path_key(key, path)) if self.wraps(module) else w

  def trained(self, params: PyTree, also: Callable[[str], bool] = lambda path: False) -> PyTree[bool]:
    """A tree of bools like `adapt`'s result: which arrays are trained.

    Args:
      also: paths of parameters that are trained in any case.
    """

    def one(path, w):
      ours = not self.adapters_only or self.wraps(path.removesuffix("/weight")) or also(path)
      return trained_parts(w) if ours else jax.tree.map(lambda _: False, w)

    return map_weights_with_path(one, params)


@dataclasses.dataclass(frozen=True)
class Full(Peft):
  """No adapters: all that is not quantized is trained."""

  kind: ClassVar[str] = "full"
  adapters_only: ClassVar[bool] = False

  def wraps(self, module: str) -> bool:
    return False


def modules_of(params: PyTree) -> list[str]:
  """The modules that have a matrix, like "blocks/attention/query"."""
  paths: list[str] = []
  map_weights_with_path(lambda path, w: paths.append(path), params)
  return [path.removesuffix("/weight") for path in paths if path.endswith("/weight")]


def is_linear(module: str) -> bool:
  """Whether a module is one of the matrices in the layers: not a router, a head or an embedding."""
  return "blocks" in module.split("/") and not re.search(r"norm|router$", module)


def matches(target: str, module: str) -> bool:
  """Whether a target means a module: "all-linear", the end of its path, or a regular expression for all of it."""
  if target == ALL_LINEAR:
    return is_linear(module)
  return f"/{module}".endswith(f"/{target}") or re.fullmatch(target, module) is not None


def check_targets(targets: Iterable[str], params: PyTree) -> None:
  """That every target means something.

  Raises:
    ConfigError: one does not, or is no regular expression.
  """
  modules = modules_of(params)
  for target in targets:
    try:
      found = any(matches(target, module) for module in modules)
    except re.error as error:
      raise ConfigError(f"peft.targets: {target!r} is not a regular expression: {error}") from None
    if not found:
      raise ConfigError(f"peft.targets: {target!r} matches no module; there are {', '.join(modules)}")

"""Low-rank adapters (Hu et al., arXiv 2106.09685); over quantized weights, QLoRA (arXiv 2305.14314)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Decay, Positive, Size
from jaxllm.models.lora import LoraWeight
from jaxllm.models.weights import dense, map_weights_with_path
from jaxllm.peft.base import ALL_LINEAR, Peft, check_targets, has, is_table, matches, module_of, paths_of


@dataclasses.dataclass(frozen=True)
class Lora(Peft):
  """W + scale A B beside every matrix of `targets`, with scale alpha / rank.

  init: "default" is PEFT's: A uniform within 1 / sqrt(inputs), B zeros; "gaussian": A normal with a deviation of
  1 / rank. Tables of embeddings have A zeros and B normal in any case. "pissa" (Meng et al., arXiv 2404.02948): A B
  begins as the largest `rank` singular values of W, and what is added is scale (A B - A₀ B₀), which is zero at first:
  W itself is not changed, and the policy without its adapter is the model as it was.
  """

  kind: ClassVar[str] = "lora"

  rank: Size = 8
  alpha: Positive = 16.0
  targets: tuple[str, ...] = (ALL_LINEAR,)
  exclude: tuple[str, ...] = ()  # of the targets
  # For the modules that a target of these means, the first that does
  rank_pattern: dict[str, Size] = dataclasses.field(default_factory=dict)
  alpha_pattern: dict[str, Positive] = dataclasses.field(default_factory=dict)
  modules_to_save: tuple[str, ...] = ()  # trained whole, with all that is in them
  dropout: Decay = 0.0
  rslora: bool = False  # scale alpha / sqrt(rank) (arXiv 2312.03732)
  init: Literal["default", "gaussian", "pissa"] = "default"
  lr_ratio: Positive = 1.0  # LoRA+ (arXiv 2402.12354): B and vectors learn so many times as fast as A
  embedding_lr: Positive = 1e-6  # peak rate of embeddings' adapters where lr_ratio is not 1, as in PEFT
  path: str = ""  # an adapter in PEFT's form to go on with; its shapes and targets are taken

  def __post_init__(self):
    for key, rank in {"rank": self.rank, **_keys("rank_pattern", self.rank_pattern)}.items():
      if rank < 1:
        raise ConfigError(f"peft.{key} is {rank}; it must be at least 1")
    positive = {name: getattr(self, name) for name in ("alpha", "lr_ratio", "embedding_lr")}
    for key, value in (positive | _keys("alpha_pattern", self.alpha_pattern)).items():
      if value <= 0:
        raise ConfigError(f"peft.{key} is {value}; it must be over 0")
    if not 0 <= self.dropout < 1:
      raise ConfigError(f"peft.dropout is {self.dropout}; it must be at least 0 and below 1")
    if self.path and self.init != "default":
      raise ConfigError(f"peft.init is {self.init!r}, but an adapter at peft.path begins as it is")

  def check(self, params):
    paths = paths_of(params)
    modules = [module for path in paths if (module := module_of(path))]
    for name in ("targets", "exclude"):
      check_targets(f"peft.{name}", getattr(self, name), modules)
    check_targets("peft.modules_to_save", self.modules_to_save, paths, has)
    adapted = [module for module in modules if self.wraps(module)]
    if self.targets and not adapted:
      raise ConfigError("peft.targets mean only modules that peft.exclude or peft.modules_to_save mean too")
    for name in ("rank_pattern", "alpha_pattern"):
      check_targets(f"peft.{name}", getattr(self, name), adapted)
    experts: list[str] = []  # one product has the rows of all of them, and nothing is dropped there
    map_weights_with_path(lambda path, w: experts.append(str(module_of(path))) if len(w.shape) > 3 else None, params)
    if self.dropout and (found := [module for module in adapted if module in experts]):
      raise ConfigError(f"peft.dropout is not for experts: set it to 0 or put {', '.join(found)} into peft.exclude")

  def wraps(self, module):
    meant = any(matches(target, module) for target in self.targets)
    return meant and not any(matches(target, module) for target in self.exclude) and not self.saves(module)

  def saves(self, path):
    return any(has(target, path) for target in self.modules_to_save)

  def keeps(self, path):
    module = module_of(path)
    return self.init == "pissa" and module is not None and self.wraps(module) and not is_table(module)

  def rank_of(self, module: str) -> int:
    """The rank of a module's adapter."""
    return _of(self.rank_pattern, module, self.rank)

  def scale_of(self, module: str) -> float:
    """What a module's A B is multiplied by."""
    rank = self.rank_of(module)
    return _of(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)

  def wrap(self, module, w, key, kept):
    *lead, inputs, outputs = w.shape
    rank, scale = self.rank_of(module), self.scale_of(module)
    if rank > min(inputs, outputs):
      raise ConfigError(f"peft.rank {rank} is over the smaller dimension of {module}, which is {inputs} x {outputs}")
    if self.init == "pissa" and not is_table(module):
      a, b = (kept["a"], kept["b"]) if kept else principal(w, rank)
      a, b = a / math.sqrt(scale), b / math.sqrt(scale)
      return LoraWeight(LoraWeight(w, a, b, scale=-scale), a, b, scale=scale, dropout=self.dropout)
    first, second = (*lead, inputs, rank), (*lead, rank, outputs)
    if is_table(module):
      a, b = jnp.zeros(first, jnp.float32), jax.random.normal(key, second, jnp.float32)
    else:
      bound = inputs**-0.5
      a = jax.random.uniform(key, first, jnp.float32, -bound, bound)
      a = jax.random.normal(key, first, jnp.float32) / rank if self.init == "gaussian" else a
      b = jnp.zeros(second, jnp.float32)
    return LoraWeight(w, a, b, scale=scale, dropout=self.dropout)

  def lr_scale(self, path, matrix, learning_rate):
    if self.lr_ratio == 1:
      return 1.0
    module, _, part = path.rpartition("/")
    if is_table(module):
      return self.embedding_lr / learning_rate if learning_rate else 1.0
    return self.lr_ratio if part == "b" or not matrix else 1.0


def principal(w: Any, rank: int) -> tuple[Float[Array, "*lead I r"], Float[Array, "*lead r O"]]:
  """a and b whose product is the best approximation of a weight of this rank, by its largest singular values; both
  take the same share of them."""
  u, s, v = jnp.linalg.svd(dense(w, jnp.float32), full_matrices=False)
  root = jnp.sqrt(s[..., :rank])
  return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]


def _of(table: Mapping[str, Any], module: str, default: Any) -> Any:
  return next((value for target, value in table.items() if matches(target, module)), default)


def _keys(name: str, table: Mapping[str, Any]) -> dict[str, Any]:
  return {f"{name}.{target}": value for target, value in table.items()}

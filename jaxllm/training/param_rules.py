"""What the optimizer does with each parameter, decided by its path (like "blocks/attention/query").

Layers are stacked: a parameter below "blocks" carries a leading layer axis, so a norm scale is [L, D] and
looks like a matrix. Names decide, therefore, and shapes only after the layer axis is taken away.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

import jax
from jaxtyping import PyTree

from jaxllm.base import patterns
from jaxllm.base.errors import ConfigError
from jaxllm.models.weights import map_weights, trained_parts
from jaxllm.training.config import OptimizerConfig

_EMBEDDING = re.compile(r"(^|/)embedding(/|$)")
_HEAD = re.compile(r"(^|/)(lm_)?head(/|$)")
_NORM_SCALE = re.compile(r"norm[^/]*/scale$")
_BIAS = re.compile(r"bias$")
_MAGNITUDE = re.compile(r"/magnitude$")  # DoRA's: of experts one vector each


@dataclasses.dataclass(frozen=True)
class ParamPlan:
  """How one parameter is updated."""

  path: str
  algorithm: Literal["adamw", "adafactor", "lion", "muon", "sgd", "frozen"]
  lr_scale: float
  weight_decay: float  # decoupled: the update holds -learning_rate * weight_decay * param
  matrix: bool  # the last two axes are one [in, out] matrix; those before them count layers and experts
  stack_axes: int  # leading axes along which every slice is a tensor of its own


def param_paths(params: PyTree) -> list[str]:
  """The path of every leaf, in the order of `jax.tree.leaves`."""
  return [
    jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]


LrScale = Callable[[str, bool, float], float]  # see `jaxllm.peft.base.Peft.lr_scale`


def plan_params(
  config: OptimizerConfig, params: PyTree, trained: PyTree[bool] | None = None, lr_scale: LrScale | None = None
) -> list[ParamPlan]:
  """Returns one ParamPlan per array of `params` (or ShapeDtypeStructs; of a weight one per part), in leaf order.

  Matrices decay; norm scales, biases, embeddings and other vectors do not. `config.rules` come first:
  a rule applies where its pattern is found in the path (`re.search`; anchor it with ^ and $ if needed) and
  no earlier rule applied; its weight_decay of None keeps what the parameter would have had. Arrays that are not
  `trained` (by default quantized weights and what adapters stand beside) and those with lr_scale 0 are frozen. Under
  muon, embeddings, heads, norms and biases take adamw, as Jordan (2024) recommends.

  Args:
    lr_scale: (path, whether it is a matrix, learning rate) -> factor of the learning rate, times that of the rules.

  Raises:
    ConfigError: a rule's pattern is no regular expression, applies to no parameter, or its lr_scale is
      negative; or no parameter is left to train.
  """
  patterns.prepare("optimizer.rules", [rule.pattern for rule in config.rules], param_paths(params), "search")
  for rule in config.rules:
    if rule.lr_scale < 0:
      raise ConfigError(f"optimizer.rules: lr_scale of {rule.pattern!r} is {rule.lr_scale}; it must be >= 0")

  used = set()
  plans = []
  trained = map_weights(trained_parts, params) if trained is None else trained
  for path, leaf, train in zip(param_paths(params), jax.tree.leaves(params), jax.tree.leaves(trained), strict=True):
    found = (i for i, rule in enumerate(config.rules) if patterns.find(rule.pattern, path, "search") is not None)
    index = next(found, None)
    used.add(index)
    plans.append(_plan(config, None if index is None else config.rules[index], path, leaf, train, lr_scale))

  for i, rule in enumerate(config.rules):
    if i not in used:
      raise ConfigError(
        f"optimizer.rules: {rule.pattern!r} applies to no parameter (the first rule that matches wins); "
        f"paths look like {plans[0].path!r}"
      )
  if all(plan.algorithm == "frozen" for plan in plans):
    why = "optimizer.rules freeze every parameter" if config.rules else "peft and model_init freeze every parameter"
    raise ConfigError(f"{why}; leave at least one to train")
  return plans


def _plan(config, rule, path, leaf, train, scale) -> ParamPlan:
  stacked = "blocks" in path.split("/")
  vector_by_name = any(name.search(path) for name in (_NORM_SCALE, _BIAS, _MAGNITUDE))
  matrix = leaf.ndim - stacked >= 2 and not vector_by_name
  decays = matrix and not _EMBEDDING.search(path)
  weight_decay = config.weight_decay if decays else 0.0
  lr_scale = 1.0 if scale is None else scale(path, matrix, config.learning_rate)
  if rule is not None:
    lr_scale *= rule.lr_scale
    weight_decay = weight_decay if rule.weight_decay is None else rule.weight_decay

  algorithm = config.name
  if algorithm == "muon" and (not matrix or _EMBEDDING.search(path) or _HEAD.search(path)):
    algorithm = "adamw"
  if lr_scale == 0 or not train:
    algorithm = "frozen"
  return ParamPlan(
    path=path,
    algorithm=algorithm,
    lr_scale=lr_scale,
    weight_decay=weight_decay,
    matrix=matrix,
    stack_axes=leaf.ndim - 2 if matrix else int(stacked),
  )

"""Noise on embeddings while a model is trained: NEFTune (Jain et al., arXiv 2310.05914)."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.models.weights import (
  Around,
  dense,
  map_weights_with_path,
  path_key,
  project,
  project_transposed,
  register,
  rows,
)

TABLE = "embedding/tokens"


@register("base", "key", settings=("alpha",))
@dataclasses.dataclass(frozen=True)
class NoisyTable(Around):
  """A table of embeddings whose rows are read with uniform noise within alpha / sqrt(T D); T: tokens of a row of the
  batch. As a head it is what it was."""

  base: Any
  key: jax.Array
  alpha: float

  def rows(self, ids, dtype, axis):
    x = rows(self.base, ids, dtype, axis)
    bound = self.alpha / math.sqrt(x.shape[-2] * x.shape[-1])
    return (x + jax.random.uniform(self.key, x.shape, jnp.float32, -bound, bound)).astype(dtype)

  def project(self, x, compute, axes, transposed):
    return (project_transposed if transposed else project)(x, self.base, compute, axes)

  def dense(self):
    return dense(self.base)


def with_noise(params: Any, alpha: float, key: jax.Array) -> Any:
  """The parameters with noise on the tokens' embeddings, an encoder's too where it shares them."""
  own = path_key(key, "noise")
  return map_weights_with_path(lambda path, w: NoisyTable(w, own, alpha) if path == TABLE else w, params)

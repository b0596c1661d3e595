"""Low-rank adapters (Hu et al., arXiv 2106.09685); over quantized weights, QLoRA (arXiv 2305.14314)."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxllm.base.errors import ConfigError
from jaxllm.models.weights import LoraWeight
from jaxllm.peft.base import ALL_LINEAR, Peft, check_targets, matches


@dataclasses.dataclass(frozen=True)
class Lora(Peft):
  """W + alpha / rank A B beside every matrix of `targets`. A begins as in PEFT: uniform within 1 / sqrt(inputs)."""

  kind: ClassVar[str] = "lora"

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = (ALL_LINEAR,)
  dropout: float = 0.0

  def __post_init__(self):
    if self.rank < 1:
      raise ConfigError(f"peft.rank is {self.rank}; it must be at least 1")
    if not 0 <= self.dropout < 1:
      raise ConfigError(f"peft.dropout is {self.dropout}; it must be at least 0 and below 1")

  def wraps(self, module):
    return any(matches(target, module) for target in self.targets)

  def wrap(self, w, key):
    *lead, inputs, outputs = w.shape
    bound = inputs**-0.5
    a = jax.random.uniform(key, (*lead, inputs, self.rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*lead, self.rank, outputs), jnp.float32)
    return LoraWeight(w, a, b, scale=self.alpha / self.rank, dropout=self.dropout)

  def adapt(self, params, key):
    check_targets(self.targets, params)
    return super().adapt(params, key)

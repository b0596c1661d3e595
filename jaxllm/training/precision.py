"""Dynamic loss scaling, which float16 needs."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
  """Dynamic loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2)."""

  scale: Float[Array, ""]
  good_steps: Int[Array, ""]  # since the scale last changed

  @classmethod
  def create(cls, scale: float) -> "LossScale":
    return cls(scale=jnp.float32(scale), good_steps=jnp.int32(0))

  def update(self, overflow: Bool[Array, ""], applied: Bool[Array, ""], growth_steps: int) -> "LossScale":
    """Halves the scale (not below 1) on overflow, doubles it after `growth_steps` applied steps in a row.

    A step that neither overflowed nor was applied (a bad step) leaves everything as it was.
    """
    good_steps = jnp.where(overflow, 0, self.good_steps + applied)
    grow = good_steps >= growth_steps
    scale = jnp.where(overflow, jnp.maximum(self.scale / 2, 1), jnp.where(grow, self.scale * 2, self.scale))
    return LossScale(scale=scale, good_steps=jnp.where(grow, 0, good_steps))

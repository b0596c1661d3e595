"""Weights with an adapter: a frozen matrix and the few trained numbers that change it.

A rank of 0 in some layers of a stack, or one below the others', is that of zeros: where a column of a and its row of b
are zero, so are both gradients, and they stay zero in every step.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels.matmul import low_rank_matmul, matmul
from jaxllm.models.weights import (
  Around,
  Weight,
  dense,
  grouped,
  is_weight,
  part_axes,
  path_key,
  project,
  project_transposed,
  ready,
  register,
  rows,
  without_adapters,
)


@register("base", "a", "b", "key", "scales", settings=("scale", "dropout"))
@dataclasses.dataclass(frozen=True)
class LoraWeight(Around):
  """base + scale a b, of which only a and b are trained (Hu et al., arXiv 2106.09685, equation 3).

  base: any weight [*lead, I, O]. a [*lead, I, r], b [*lead, r, O]: float32 master weights.
  scale: alpha / r in the paper. scales: further factors of each matrix of a stack, where its layers differ.
  dropout: of what goes into a, while there is a key.
  """

  base: Any
  a: Float[Array, "*lead I r"]
  b: Float[Array, "*lead r O"]
  key: Any = None  # [*lead] of random keys, put there by `with_keys`
  scales: Float[Array, " *lead"] | None = None
  scale: float = 1.0
  dropout: float = 0.0

  @property
  def rank(self) -> int:
    """The largest of its matrices."""
    return self.a.shape[-1]

  @property
  def _second(self) -> Array:
    """b with the factors of each matrix, but for `scale`."""
    return self.b if self.scales is None else self.b * self.scales[..., None, None].astype(self.b.dtype)

  @property
  def scaled_b(self) -> Float[Array, "*lead r O"]:
    """b with all factors: what is added to the base is a times this."""
    return self.scale * self._second

  def _dropped(self, x):
    if self.key is None or not self.dropout:
      return x
    kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
    return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)

  def _change(self, x, compute, transposed):
    """scale x a b, or scale x bᵀ aᵀ."""
    first, second = (self._second, self.a) if transposed else (self.a, self._second)
    backend = compute.backend("matmul")
    narrow = matmul(x, first, backend=backend, transposed=transposed)
    return self.scale * matmul(narrow, second, backend=backend, transposed=transposed)

  def _changed_rows(self, ids, dtype, axis):
    return self.scale * matmul(rows(self.a, ids, dtype, axis, None), self._second)

  def _changed_groups(self, x, group_sizes, compute, split):
    over = lambda dimension: split if split and split[1] == dimension else None  # noqa: E731
    narrow = grouped(x, self.a, group_sizes, compute, over(1))
    return self.scale * grouped(narrow, self._second, group_sizes, compute, over(2))

  def _delta(self) -> Array:
    return self.scale * jnp.matmul(self.a, self._second)

  def project(self, x, compute, axes, transposed):
    dropped = self._dropped(x)
    if not is_weight(self.base) and dropped is x and not transposed:
      return low_rank_matmul(x, self.base, self.a, self.scaled_b, backend=compute.backend("matmul"))
    y = (project_transposed if transposed else project)(x, self.base, compute, axes)
    return y + self._change(dropped, compute, transposed)

  def rows(self, ids, dtype, axis):
    return rows(self.base, ids, dtype, axis) + self._changed_rows(ids, dtype, axis)

  def grouped(self, x, group_sizes, compute, split):
    return grouped(x, self.base, group_sizes, compute, split) + self._changed_groups(x, group_sizes, compute, split)

  def dense(self):
    return dense(self.base) + self._delta()

  def map_parts(self, function):
    return dataclasses.replace(self, base=function(self.base), a=function(self.a), b=function(self.b))

  def part_axes(self, axes, ways):
    *lead, inputs, outputs = axes
    return dataclasses.replace(
      self,
      base=part_axes(self.base, axes, ways),
      a=(*lead, inputs, None),
      b=(*lead, None, outputs),
      key=None if self.key is None else tuple(lead),
      scales=None if self.scales is None else tuple(lead),
    )

  def trained(self):
    frozen = jax.tree.map(lambda _: False, self.base)
    key, scales = (None if part is None else False for part in (self.key, self.scales))
    return dataclasses.replace(self, base=frozen, a=True, b=True, key=key, scales=scales)

  def with_key(self, path, key):
    base = self.base.with_key(f"{path}/base", key) if isinstance(self.base, Weight) else self.base
    if not self.dropout:
      return dataclasses.replace(self, base=base)
    own = path_key(key, path)
    return dataclasses.replace(self, base=base, key=jax.random.split(own, self.shape[:-2]) if self.ndim > 2 else own)

  def ready(self):
    return dataclasses.replace(self, base=ready(self.base))

  @property
  def adapted(self):
    return True

  def bare(self):
    return without_adapters(self.base)


@register("base", "a", "b", "key", "scales", "magnitude", settings=("scale", "dropout"))
@dataclasses.dataclass(frozen=True)
class DoraWeight(LoraWeight):
  """m (base + scale a b) / |base + scale a b|, each output's column by its own length (Liu et al., arXiv 2402.09353).

  No gradient passes through the lengths (section 4.3). magnitude: m [*lead, O], trained; it begins as the base's
  lengths. What is dropped is dropped from x for all but the base's own product, as PEFT does.
  """

  magnitude: Float[Array, "*lead O"] = None  # type: ignore[assignment]

  def factor(self) -> Float[Array, "*lead O"]:
    """What each output is multiplied by, m / |base + scale a b|, in float32."""
    w = lax.stop_gradient(dense(self.base).astype(jnp.float32) + self._delta().astype(jnp.float32))
    squares = jnp.square(w).sum(-2)
    return self.magnitude.astype(jnp.float32) / jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))

  def project(self, x, compute, axes, transposed):
    product = project_transposed if transposed else project
    factor = self.factor().astype(x.dtype)
    dropped = self._dropped(x)
    if transposed:  # the outputs are what comes in
      changed = product(dropped * factor, self.base, compute, axes) + self._change(dropped * factor, compute, True)
      return changed if dropped is x else changed + product(x - dropped, self.base, compute, axes)
    y = product(dropped, self.base, compute, axes)
    changed = factor * (y + self._change(dropped, compute, False))
    return changed if dropped is x else changed + product(x, self.base, compute, axes) - y

  def rows(self, ids, dtype, axis):
    y = rows(self.base, ids, dtype, axis) + self._changed_rows(ids, dtype, axis)
    return y * self.factor().astype(dtype)

  def grouped(self, x, group_sizes, compute, split):
    return self.ready().grouped(x, group_sizes, compute, split)

  def ready(self):
    names = [field.name for field in dataclasses.fields(LoraWeight)]
    inner = LoraWeight(**{name: getattr(self, name) for name in names})
    return ScaledWeight(inner.ready(), self.factor())

  def dense(self):
    return (dense(self.base) + self._delta()) * self.factor()[..., None, :]

  def map_parts(self, function):
    return dataclasses.replace(super().map_parts(function), magnitude=function(self.magnitude))

  def part_axes(self, axes, ways):
    return dataclasses.replace(super().part_axes(axes, ways), magnitude=(*axes[:-2], axes[-1]))

  def trained(self):
    return dataclasses.replace(super().trained(), magnitude=True)


@register("base", "factor")
@dataclasses.dataclass(frozen=True)
class ScaledWeight(Around):
  """A stack of experts whose outputs are multiplied by a factor each: DoRA, when the lengths are known.

  base: [*lead, I, O]. factor: [*lead, O].
  """

  base: Any
  factor: Float[Array, "*lead O"]

  def grouped(self, x, group_sizes, compute, split):
    factor = self.factor.astype(x.dtype)
    if split and split[1] == 2:
      factor = lax.all_gather(factor, split[0], axis=1, tiled=True)
    of_row = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(x))
    return grouped(x, self.base, group_sizes, compute, split) * factor[of_row]

  def part_axes(self, axes, ways):
    return ScaledWeight(part_axes(self.base, axes, ways), (*axes[:-2], axes[-1]))


def column_lengths(w: Any) -> Float[Array, "*lead O"]:
  """|W| of each output, float32: with which a `DoraWeight`'s magnitude begins."""
  return jnp.sqrt(jnp.square(dense(w, jnp.float32)).sum(-2))


def trimmed(a: Array, b: Array) -> int:
  """The rank that a pair [I, r], [r, O] uses: without the zeros that fill up a stack."""
  used = (a != 0).any(0) | (b != 0).any(1)
  return int(used.nonzero()[0][-1]) + 1 if used.any() else 0

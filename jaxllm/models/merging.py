"""Adapters put into the weights under them, and taken out again without a rounding."""

import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from jaxllm.models.weights import (
  Weight,
  dense,
  grouped,
  is_adapted,
  is_per_layer,
  map_weights,
  part_axes,
  project,
  project_transposed,
  register,
  rows,
)


@register("whole", "apart")
@dataclasses.dataclass(frozen=True)
class MergedWeight(Weight):
  """A plain matrix that is used, beside the weight with adapters that it was made of, which keeps the base's arrays."""

  whole: Any
  apart: Any

  @property
  def shape(self) -> tuple[int, ...]:  # type: ignore[override]
    return self.whole.shape

  @property
  def dtype(self):  # type: ignore[override]
    return self.whole.dtype

  def project(self, x, compute, axes, transposed):
    return (project_transposed if transposed else project)(x, self.whole, compute, axes)

  def rows(self, ids, dtype, axis):
    return rows(self.whole, ids, dtype, axis)

  def grouped(self, x, group_sizes, compute, split):
    return grouped(x, self.whole, group_sizes, compute, split)

  def dense(self):
    return dense(self.whole)

  def map_parts(self, function):
    return MergedWeight(function(self.whole), function(self.apart))

  def part_axes(self, axes, ways):
    return MergedWeight(axes, part_axes(self.apart, axes, ways))

  def trained(self):
    return jax.tree.map(lambda _: False, self)

  def bare(self):
    return self.apart.bare()


def merge(params: PyTree) -> PyTree:
  """The parameters with a `MergedWeight` for each that has adapters: no adapter costs time, all cost memory.

  The sum is made in float32 and rounded to the base's dtype.
  """

  def one(w):
    if is_per_layer(w):
      return w.map_parts(one)
    return MergedWeight(dense(w).astype(w.dtype), w) if is_adapted(w) else w

  return map_weights(one, params)


def unmerge(params: PyTree) -> PyTree:
  """The inverse of `merge`: the same arrays that were merged, to the bit."""

  def one(w):
    if is_per_layer(w):
      return w.map_parts(one)
    return w.apart if isinstance(w, MergedWeight) else w

  return map_weights(one, params)

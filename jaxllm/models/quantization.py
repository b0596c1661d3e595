"""Quantized parameters: which they are, and double quantization, their scales in 8 bits too (QLoRA, arXiv 2305.14314,
section 3)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import QuantizedWeight, dequantize, quantize
from jaxllm.models.weights import (
  Around,
  Weight,
  grouped,
  is_per_layer,
  is_quantizable,
  is_weight,
  part_axes,
  project,
  project_transposed,
  register,
  rows,
)

BLOCK = 256  # scales that share a scale


def quantize_matrix(path: str, w: Any, format: Any, group_size: int | None = None, double: bool = False) -> Any:
  """The weight of the parameter at `path` in a format of `jaxllm.kernels.quantize`, if it is quantizable and plain;
  of one kept layer by layer each layer's, of one under an adapter the base.

  Args:
    format: None leaves it as it is. double: its scales are quantized too.

  Raises:
    ConfigError: no such format, or groups that do not divide the matrix; the message names it.
  """
  if is_per_layer(w):
    return w.map_parts(lambda layer: quantize_matrix(path, layer, format, group_size, double))
  if isinstance(w, Around):
    return dataclasses.replace(w, base=quantize_matrix(path, w.base, format, group_size, double))
  if format is None or not is_quantizable(path) or is_weight(w):
    return w
  try:
    found = quantize(w, format, group_size)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from None
  return double_quantize(found) if double else found


def quantize_table(w: Any) -> Any:
  """A table of token vectors [V, D] in int8, with a scale for each token, if it is a plain matrix."""
  return TurnedWeight(quantize(jnp.swapaxes(w, -1, -2), "int8")) if not is_weight(w) else w


@register("base")
@dataclasses.dataclass(frozen=True)
class TurnedWeight(Weight):
  """A table W [V, D] as its transpose quantized: the codes of a token lie together, for the lookup and for the head."""

  base: QuantizedWeight  # [D, V]

  @property
  def shape(self) -> tuple[int, ...]:  # type: ignore[override]
    return self.base.shape[::-1]

  @property
  def dtype(self):  # type: ignore[override]
    return self.base.dtype

  def project(self, x, compute, axes, transposed):
    axes = None if axes is None else axes[::-1]
    return (project if transposed else project_transposed)(x, self.base, compute, axes)

  def rows(self, ids, dtype, axis):
    known = (ids >= 0) & (ids < self.shape[0])
    at = jnp.clip(ids, 0, self.shape[0] - 1)
    own = dataclasses.replace(
      self.base, values=self.base.values[at.reshape(-1)], scales=self.base.scales[:, at.reshape(-1)]
    )
    found = dequantize(own).T.reshape(*ids.shape, -1)
    return jnp.where(known[..., None], found, jnp.nan).astype(dtype)

  def dense(self):
    return dequantize(self.base).T

  def map_parts(self, function):
    return self  # codes and scales stay as they are

  def part_axes(self, axes, ways):
    return TurnedWeight(part_axes(self.base, axes[::-1], ways))

  def trained(self):
    return jax.tree.map(lambda _: False, self)


@functools.cache
def dynamic_map() -> Float[np.ndarray, " 256"]:
  """The 256 numbers of the signed dynamic 8-bit type, ascending (Dettmers et al., arXiv 2110.02861, section 2.1).

  For each power of ten down to 1e-6 there are the middles of equal parts between a tenth of it and itself: 64 of
  either sign for 1, half as many for each smaller one; and 0 and 1.
  """
  numbers = [np.float32(0), np.float32(1)]
  for i in range(7):
    count, low = 2**i, np.float64(np.float32(0.1))
    step = np.float64(np.float32((np.float32(1) - np.float32(0.1)) / np.float32(count)))
    at = np.arange(count + 1)
    # From both ends, with one rounding a number, which is how PyTorch divides a range
    edges = np.where(at < (count + 1) // 2, low + step * at, 1 - step * (count - at)).astype(np.float32)
    middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
    numbers += [*middles, *-middles]
  return np.sort(np.asarray(numbers, np.float32))


@register("weight", "blocks", "offset")
@dataclasses.dataclass(frozen=True)
class DoubleQuantizedWeight(Weight):
  """A quantized weight whose scale is map[code] * block + offset.

  The order of scales is that of bitsandbytes: those of an output's groups follow each other, then the next output's.

  weight: its scales [*lead, G, F] are the codes. blocks: [*lead, ceil(G F / 256)]. offset: [*lead].
  """

  weight: QuantizedWeight
  blocks: Float[Array, "*lead n"]
  offset: Float[Array, " *lead"]

  @property
  def shape(self) -> tuple[int, ...]:  # type: ignore[override]
    return self.weight.shape

  @property
  def dtype(self):  # type: ignore[override]
    return self.blocks.dtype

  def single(self) -> QuantizedWeight:
    """The weight with its scales multiplied out."""
    codes = self.weight.scales
    numbers = jnp.asarray(dynamic_map())[codes]
    G, F = codes.shape[-2:]
    used = _groups(self.weight)
    block = (jnp.arange(F) * used + jnp.minimum(jnp.arange(G), used - 1)[:, None]) // BLOCK
    scales = numbers * self.blocks[..., block] + self.offset[..., None, None]
    return dataclasses.replace(self.weight, scales=jnp.where(jnp.arange(G)[:, None] < used, scales, 0))

  def project(self, x, compute, axes, transposed):
    return (project_transposed if transposed else project)(x, self.single(), compute, axes)

  def rows(self, ids, dtype, axis):
    return rows(self.single(), ids, dtype, axis)

  def grouped(self, x, group_sizes, compute, split):
    w = self.single()
    if split is not None:
      w = dataclasses.replace(w, scales=_own_scales(w, split))
    return grouped(x, w, group_sizes, compute, split)

  def dense(self):
    return dequantize(self.single())

  def map_parts(self, function):
    return self  # codes and scales stay as they are

  def part_axes(self, axes, ways):
    # The codes of scales are whole on every device: a block of them has those of several outputs
    lead = tuple(axes[:-2])
    weight = dataclasses.replace(part_axes(self.weight, axes, ways), scales=(*lead, None, None))
    return DoubleQuantizedWeight(weight, (*lead, None), lead)

  def trained(self):
    return jax.tree.map(lambda _: False, self)


def double_quantize(w: QuantizedWeight) -> DoubleQuantizedWeight:
  """The weight with its scales in 8 bits: blocks of 256 of them, less the mean of all."""
  used = _groups(w)
  scales = jnp.swapaxes(w.scales[..., :used, :].astype(jnp.float32), -1, -2)
  *lead, F, _ = scales.shape
  flat = scales.reshape(*lead, F * used)
  offset = flat.mean(-1)
  padded = jnp.pad(flat - offset[..., None], [(0, 0)] * len(lead) + [(0, -F * used % BLOCK)])
  parts = padded.reshape(*lead, -1, BLOCK)
  blocks = jnp.abs(parts).max(-1)
  numbers = dynamic_map()
  middles = jnp.asarray((numbers[:-1] + numbers[1:]) / 2)
  scaled = parts / jnp.where(blocks == 0, 1, blocks)[..., None]
  codes = jnp.searchsorted(middles, scaled).astype(jnp.uint8).reshape(*lead, -1)[..., : F * used]
  codes = jnp.swapaxes(codes.reshape(*lead, F, used), -1, -2)
  extra = [(0, 0)] * len(lead) + [(0, w.scales.shape[-2] - used), (0, 0)]
  return DoubleQuantizedWeight(dataclasses.replace(w, scales=jnp.pad(codes, extra)), blocks, offset)


def _own_scales(w: QuantizedWeight, split: Any) -> Array:
  """Inside shard_map, where scales are whole and codes may be split: the scales of the codes at hand."""
  axes, dimension = split
  if dimension == 2:
    axis, size = w.scales.ndim - 1, w.values.shape[-2]
  elif w.group_size is None or w.padded_features >= w.in_features:
    return w.scales
  else:
    axis, size = w.scales.ndim - 2, w.padded_features // w.group_size
  return lax.dynamic_slice_in_dim(w.scales, lax.axis_index(axes) * size, size, axis)


def _groups(w: QuantizedWeight) -> int:
  """How many rows of scales are no padding."""
  return 1 if w.group_size is None else w.in_features // w.group_size

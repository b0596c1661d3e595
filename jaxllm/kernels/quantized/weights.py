"""A quantized weight: what is stored, in which order, and rounding to it.

One layout for every chip. A weight W [D, F] (y = x W) is stored transposed, a row of codes for each output feature,
because then the contraction runs along memory: 8-bit tensor cores of Hopper read nothing else, its 16-bit ones take
such rows straight into registers, a CPU's dot products stream them, and a TPU's matrix unit takes either order.

* values [F, D']: D' is D rounded up to a multiple of 128 (8-bit formats) or 256 (4-bit). 4-bit codes come in blocks of
  256 along D: byte j of a block's 128 holds code j in its low half and code 128 + j in its high half. Unpacking is then
  a mask and a shift on whole vectors, and either half is a contiguous piece of D: nothing moves between lanes.
* scales [ceil(D' / group_size), F], zeros alike: a group's scales of neighbouring features lie side by side, as a
  tile of a kernel needs them. group_size None: one row, a scale for each output feature.

What lies past D is padding: activations of 0 meet it, and its part of a gradient is cut off. Leading axes (layers of a
stack) may stand before all of them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError

Format = Literal["int8", "int4", "nf4", "fp8", "int8_dynamic", "fp8_dynamic"]
FORMATS: tuple[str, ...] = get_args(Format)
HALF = 128  # codes of a packed block's low halves, and of its high halves

# The 16 values of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = (
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
  """A weight W [D, F] in one of the formats:

  int8: W = code * scale, codes -128..127 as int8.
  int4: W = (code - zero) * scale, codes 0..15, two in a byte; zero is 8 where `zeros` is None.
  nf4: W = NF4[code] * scale, two codes in a byte.
  fp8: W = code * scale, codes float8_e4m3fn.
  int8_dynamic, fp8_dynamic: the same codes, and the activations of each token are rounded to the same type with a
    scale of their own when they are multiplied (W8A8). A scale for each output feature only.
  """

  values: Array  # [..., F, D'] int8 | float8_e4m3fn, or [..., F, D' / 2] uint8
  scales: Float[Array, "... G F"]
  zeros: Float[Array, "... G F"] | None
  format: Format = dataclasses.field(metadata={"static": True})
  group_size: int | None = dataclasses.field(metadata={"static": True})
  in_features: int = dataclasses.field(metadata={"static": True})  # D

  @property
  def shape(self) -> tuple[int, ...]:
    """[..., D, F], of the weight it stands for."""
    return (*self.values.shape[:-2], self.in_features, self.values.shape[-2])

  @property
  def ndim(self) -> int:
    """Of the weight it stands for."""
    return self.values.ndim

  @property
  def dtype(self):
    """In which it is multiplied out."""
    return self.scales.dtype

  @property
  def packed(self) -> bool:
    """Two codes in a byte."""
    return self.format in ("int4", "nf4")

  @property
  def dynamic(self) -> bool:
    """The activations are quantized too."""
    return self.format.endswith("_dynamic")

  @property
  def padded_features(self) -> int:
    """D'."""
    return self.values.shape[-1] * (2 if self.packed else 1)


def quantize(
  w: Float[Array, "*layers D F"],
  format: Format,
  group_size: int | None = None,
  *,
  asymmetric: bool = False,
  scale_dtype=jnp.float32,
) -> QuantizedWeight:
  """W rounded to the nearest codes; scales from the largest magnitude of a group.

  The bounds are those of `qwix`: the largest magnitude maps to half a step past the largest integer code, so that all
  codes are used evenly. Codes are chosen for the scales as stored.

  Args:
    group_size: so many weights along D share a scale; None: all D.
    asymmetric: int4 only: a group's smallest and largest weights map to codes 0 and 15, and it stores a zero point.
    scale_dtype: of the scales and zero points.

  Raises:
    ConfigError: an unknown format, a group size that does not divide D or that the format does not have.
  """
  *_, D, F = w.shape
  if format not in FORMATS:
    raise ConfigError(f"unknown format {format!r} of a quantized weight; choose one of {', '.join(FORMATS)}")
  if group_size is not None and (group_size <= 0 or D % group_size):
    raise ConfigError(f"groups of {group_size} do not divide the {D} inputs of the weight")
  if group_size is not None and format.endswith("_dynamic"):
    raise ConfigError(f"{format} has a scale for each output feature, so group_size must be None")
  if asymmetric and format != "int4":
    raise ConfigError(f"zero points are for int4, not {format}")
  groups = w.astype(jnp.float32).reshape(*w.shape[:-2], D // (group_size or D), group_size or D, F)
  zeros = None
  if asymmetric:
    low, high = jnp.minimum(groups.min(-2), 0), jnp.maximum(groups.max(-2), 0)
    scales = _rounded((high - low) / 15, scale_dtype)
    zeros = jnp.clip(jnp.round(-low / scales.astype(jnp.float32)), 0, 15).astype(scale_dtype)
  else:
    scales = _rounded(jnp.abs(groups).max(-2) / BOUND[format], scale_dtype)
  scaled = groups / scales.astype(jnp.float32)[..., None, :]
  if format == "nf4":
    middles = jnp.asarray([(a + b) / 2 for a, b in zip(NF4, NF4[1:])], jnp.float32)
    codes = jnp.searchsorted(middles, scaled)
  elif format.startswith("fp8"):
    codes = jnp.clip(scaled, -448, 448).astype(jnp.float8_e4m3fn)
  elif format == "int4":
    offset = 8 if zeros is None else zeros.astype(jnp.float32)[..., None, :]
    codes = jnp.clip(jnp.round(scaled + offset), 0, 15)
  else:
    codes = jnp.clip(jnp.round(scaled), -128, 127)
  return from_codes(codes.reshape(w.shape), scales, zeros, format, group_size)


# The magnitude, in steps of the code, that a group's largest weight maps to.
BOUND = {"int8": 127.5, "int8_dynamic": 127.5, "int4": 7.5, "nf4": 1.0, "fp8": 448.0, "fp8_dynamic": 448.0}


def _rounded(scales, dtype):
  return jnp.where(scales < math.sqrt(jnp.finfo(jnp.float32).tiny), 1.0, scales).astype(dtype)


def from_codes(
  codes: Array, scales: Array, zeros: Array | None, format: Format, group_size: int | None
) -> QuantizedWeight:
  """The weight with these codes [..., D, F], scales and zero points [..., D / group_size, F], in this file's layout.

  Where weights of other programs come in. Codes: -128..127, float8_e4m3fn, or 0..15 for int4 and nf4.
  """
  packed, D = format in ("int4", "nf4"), codes.shape[-2]
  if packed:
    codes = codes.astype(jnp.uint8)
  elif format.startswith("int8"):
    codes = codes.astype(jnp.int8)
  codes = jnp.swapaxes(codes, -1, -2)
  block = 2 * HALF if packed else HALF
  padded = -(-D // block) * block
  values = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, padded - D)])
  rows = -(-padded // group_size) if group_size else 1
  extra = [(0, 0)] * (scales.ndim - 2) + [(0, rows - scales.shape[-2]), (0, 0)]
  scales, zeros = jnp.pad(scales, extra), None if zeros is None else jnp.pad(zeros, extra)
  return QuantizedWeight(pack(values) if packed else values, scales, zeros, format, group_size, D)


def pack(codes: Array) -> Array:
  """Codes 0..15 [..., D'], two to a byte [..., D' / 2]."""
  blocks = codes.reshape(*codes.shape[:-1], -1, 2, HALF)
  return (blocks[..., 0, :] | (blocks[..., 1, :] << 4)).reshape(*codes.shape[:-1], -1)


def unpack(values: Array) -> Array:
  """Inverse of `pack`."""
  blocks = values.reshape(*values.shape[:-1], -1, 1, HALF)
  return jnp.concatenate([blocks & 15, blocks >> 4], -2).reshape(*values.shape[:-1], -1)


def dequantize(weight: QuantizedWeight, dtype=jnp.float32) -> Float[Array, "*layers D F"]:
  """The dense weight that `weight` stands for; computed in float32 and rounded to `dtype` once."""
  D, size = weight.in_features, weight.group_size or weight.in_features
  codes = jnp.swapaxes((unpack(weight.values) if weight.packed else weight.values)[..., :D], -1, -2)
  groups = codes.reshape(*codes.shape[:-2], D // size, size, codes.shape[-1])
  per_group = lambda a: None if a is None else a[..., : D // size, None, :]  # noqa: E731
  return _real(weight, groups, per_group(weight.scales), per_group(weight.zeros)).reshape(codes.shape).astype(dtype)


def _real(weight, codes, scales, zeros) -> Float[Array, "..."]:
  """The numbers that codes stand for, in float32; scales and zero points (None: none) broadcast with the codes."""
  real = jnp.asarray(NF4, jnp.float32)[codes] if weight.format == "nf4" else codes.astype(jnp.float32)
  if weight.format == "int4":
    real -= 8 if zeros is None else zeros.astype(jnp.float32)
  return real * scales.astype(jnp.float32)


def splits(weight: QuantizedWeight, ways: int) -> bool:
  """Whether the inputs D can be split so many ways: into whole blocks of codes and whole groups, with no padding."""
  block, size = 2 * HALF if weight.packed else HALF, weight.group_size or 1
  return weight.in_features % (ways * block) == 0 and weight.in_features // ways % size == 0


def part_axes(
  weight: QuantizedWeight, axes: Sequence[str | None], ways: Callable[[str], int] | None = None
) -> dict[str, tuple[str | None, ...]]:
  """The logical axes of each part, of a weight [..., D, F] whose own are `axes`.

  Codes lie turned, [..., F, D']; scales and zero points are [..., G, F], and one row of them, of all D, is whole.

  Args:
    ways: how many ways an axis is split. A dimension that cannot be is None then: D is split as `splits` says.
  """
  *outer, of_inputs, of_features = axes
  if ways is not None:
    whole = of_inputs is not None and not splits(weight, ways(of_inputs))
    of_inputs = None if whole else of_inputs
    of_features = None if of_features is None or weight.shape[-1] % ways(of_features) else of_features
  scales = (*outer, None if weight.group_size is None else of_inputs, of_features)
  found = {"values": (*outer, of_features, of_inputs), "scales": scales}
  return found if weight.zeros is None else found | {"zeros": scales}


def rows(weight: QuantizedWeight, ids: Int[Array, "*batch"], dtype=jnp.float32) -> Float[Array, "*batch F"]:
  """`dequantize(weight, dtype)[ids]` of an embedding table [D, F], without the rest of it; NaN for ids that it lacks.

  Of a table one stores the transpose, so that an id is a column of codes: F bytes, or half of each.
  """
  at = jnp.clip(ids, 0, weight.in_features - 1)
  column = at // (2 * HALF) * HALF + at % HALF if weight.packed else at
  codes = jnp.moveaxis(jnp.take(weight.values, column, axis=1), 0, -1)
  if weight.packed:
    codes = jnp.where((at % (2 * HALF) < HALF)[..., None], codes & 15, codes >> 4)
  group = at // (weight.group_size or weight.in_features)
  of_group = lambda a: None if a is None else a[group]  # noqa: E731
  real = _real(weight, codes, of_group(weight.scales), of_group(weight.zeros))
  known = (ids >= 0) & (ids < weight.in_features)
  return jnp.where(known[..., None], real, jnp.nan).astype(dtype)

"""Codes to bfloat16 in the registers of a Hopper warpgroup: what the forward and the backward kernel share."""

from collections.abc import Sequence

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jaxllm.kernels.hopper import ROW
from jaxllm.kernels.quantized.weights import QuantizedWeight

# NF4[7 + 8 u] = u q(u), u = (code - 7) / 8, for the negative codes and for the positive ones: the polynomials of
# least degree that round to NF4's values in bfloat16 for each code. The table in registers would cost 15 selections
# for each weight.
NF4_NEGATIVE = (0.69602, -0.44093, -2.44595, -7.84636, -10.95449, -6.03937)
NF4_POSITIVE = (0.59134, 0.67104, -3.46943, 8.7871, -9.82081, 4.23995)


def nf4(u: jax.Array) -> jax.Array:
  """NF4's values for u = (code - 7) / 8 in float32; exact once rounded to bfloat16."""
  negative, positive = jnp.full_like(u, NF4_NEGATIVE[-1]), jnp.full_like(u, NF4_POSITIVE[-1])
  for a, b in zip(NF4_NEGATIVE[-2::-1], NF4_POSITIVE[-2::-1]):
    negative, positive = negative * u + a, positive * u + b
  return u * jnp.where(u < 0, negative, positive)


def load_codes(weight: QuantizedWeight, tile: jax.Array, half: int) -> jax.Array:
  """bfloat16 codes (less the zero point 8, or NF4's values) of the low or high halves of an int8 tile.

  No shifts, which 8-bit lanes lack: the high half stays 16 times too large, as a signed number, until it is
  bfloat16, where dividing by 16 is exact.
  """
  if not weight.packed:
    if tile.dtype != jnp.int8:  # from 8-bit floats Hopper converts to float16 or float32 only
      tile = tile.astype(jnp.float32)
    return tile.astype(jnp.bfloat16)
  if half:  # flipping the top bit makes code - 8 of it, in two's complement
    signed = ((tile ^ jnp.int8(-128)) & jnp.int8(-16)).astype(jnp.bfloat16) * jnp.bfloat16(1 / 16)
  else:
    signed = (tile & jnp.int8(15)).astype(jnp.bfloat16) - jnp.bfloat16(8)
  if weight.format == "int4":
    return signed
  return nf4(signed.astype(jnp.float32) * 0.125 + 0.125).astype(jnp.bfloat16)


def scale_rows(weight: QuantizedWeight, padded: int) -> tuple[jax.Array, ...]:
  """(scales,) or (scales, zeros) in float32, padded to so many features."""
  arrays = (weight.scales,) if weight.zeros is None else (weight.scales, weight.zeros)
  return tuple(jnp.pad(a.astype(jnp.float32), ((0, 0), (0, padded - a.shape[1]))) for a in arrays)


def scaled(weight: QuantizedWeight, codes: jax.Array, groups: Sequence, mine, zero) -> jax.Array:
  """codes [R, K] times their groups' scales, less zero points.

  groups: (scales,) or (scales, zeros), shared memory [groups of the tile, features of the block], of which `mine` are
  the tile's; empty where the scales are those of output features and multiply the sums. zero: then the features' zero
  points, or None.
  """

  def spread(values, columns):
    return lax.broadcast_in_dim(values.astype(jnp.bfloat16), (codes.shape[0], columns), [0])

  def row(ref, group):
    return plgpu.load(ref.at[group, mine], layout=ROW)

  if not groups:
    return codes if zero is None else codes - spread(zero - 8.0, codes.shape[1])
  count = groups[0].shape[0]
  size = codes.shape[1] // count
  parts = []
  for j in range(count):
    part = codes[:, j * size : (j + 1) * size]
    if len(groups) > 1:
      part -= spread(row(groups[1], j) - 8.0, size)
    parts.append(part * spread(row(groups[0], j), size))
  return parts[0] if count == 1 else lax.concatenate(parts, 1)

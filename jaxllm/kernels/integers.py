"""16-bit floats as integers of 15 bits, for exact products in the 8-bit tensor core of Hopper."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8


def split(x: Float[Array, "*rows D"]) -> tuple[Int8[Array, "2 *rows D"], Float[Array, "*rows"]]:
  """x as integers 256 upper + lower: `upper` and `lower`, and the largest magnitude of each row.

  x is such an integer times `split_scale` of the row's largest magnitude: exact if it is larger than 1/64 of that, else
  off by 2^-14 of it at most.
  """
  largest = jnp.abs(x).max(-1).astype(jnp.float32)
  whole = jnp.round(x.astype(jnp.float32) / split_scale(largest)[..., None]).astype(jnp.int32)
  lower = ((whole + 128) & 255) - 128
  return jnp.stack([(whole - lower) >> 8, lower]).astype(jnp.int8), largest


def split_scale(largest: jax.Array) -> jax.Array:
  """2^-13 times the largest power of two that is no larger than `largest`, a normal float32; 0 and infinity stay."""
  exponent = lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
  return lax.bitcast_convert_type(exponent, jnp.float32) * 2.0**-13

"""Where a token stands: rotary, learned, sinusoidal, ALiBi and bucketed relative positions."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.kernels.elementwise import rope
from jaxllm.models.config import ModelConfig, RopeScaling


def rope_frequencies(
  dim: int, theta: float, scaling: RopeScaling | None, lengths: Int[Array, "*B"] | None = None
) -> tuple[Float[np.ndarray | Array, "*B dim/2"], float]:
  """Angular frequencies in radians per position, and the factor on cos and sin.

  Su et al., arXiv 2104.09864; the scalings' sources stand at `RopeScaling`.

  Args:
    lengths: of texts, for scalings that go by them; None: no text is longer than the original context.
  """
  exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
  if scaling is None:
    return theta**-exponent, 1.0
  if scaling.kind == "linear":
    return theta**-exponent / scaling.factor, 1.0
  if scaling.kind == "ntk":
    return (theta * scaling.factor ** (dim / (dim - 2))) ** -exponent, 1.0
  base, original = theta**-exponent, scaling.original_max_seq_len
  if scaling.kind == "dynamic":
    if lengths is None:
      return base, 1.0
    grown = scaling.factor * jnp.maximum(lengths, original)[..., None] / original - (scaling.factor - 1)
    return jnp.asarray(base, jnp.float32) * grown ** -jnp.asarray(exponent * dim / (dim - 2), jnp.float32), 1.0
  if scaling.kind == "longrope":
    factor = scaling.attention_factor
    if factor is None:
      factor = math.sqrt(1 + math.log(scaling.factor) / math.log(original)) if scaling.factor > 1 else 1.0
    short = base / np.asarray(scaling.short_factors)
    if lengths is None:
      return short, factor
    return jnp.where((lengths > original)[..., None], base / np.asarray(scaling.long_factors), short), factor
  if scaling.kind == "llama3":
    wavelength = 2 * math.pi / base
    low = scaling.original_max_seq_len / scaling.low_freq_factor
    high = scaling.original_max_seq_len / scaling.high_freq_factor
    smooth = (scaling.original_max_seq_len / wavelength - scaling.low_freq_factor) / (
      scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * base / scaling.factor + smooth * base
    return np.where(wavelength > low, base / scaling.factor, np.where(wavelength < high, base, blended)), 1.0

  def dimension(rotations):  # that turns so many times within the original context (eq. 17 of YaRN)
    return dim * math.log(scaling.original_max_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))

  low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
  factor = scaling.attention_factor
  if factor is None:
    factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
  return base / scaling.factor * ramp + base * (1 - ramp), factor


def rope_table(
  c: ModelConfig, positions: Int[Array, "B T"], local: bool, lengths: Int[Array, "#B #T"] | None = None
) -> tuple[Array, Array]:
  """cos and sin [B, T, rotary_dim / 2] of every position's angles, float32; `lengths` of the texts, where these matter
  (`ModelConfig.rope_switch`)."""
  theta = c.rope_local_theta if local and c.rope_local_theta else c.rope_theta
  # Gemma 3 stretches its global layers only; a model with one theta stretches all.
  scaling = None if local and c.rope_local_theta else c.rope_scaling
  frequencies, factor = rope_frequencies(c.rotary_dim, theta, scaling, lengths)
  angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
  return factor * jnp.cos(angles), factor * jnp.sin(angles)


def apply_rope(
  x: Float[Array, "B T N H"], table: tuple[Array, Array], *, backend: str = "xla"
) -> Float[Array, "B T N H"]:
  """Rotates the pairs (i, i + rotary_dim / 2) of the first rotary_dim dimensions of every head."""
  cos, sin = table
  rotary_dim = 2 * cos.shape[-1]
  if rotary_dim == x.shape[-1]:
    return rope(x, cos, sin, backend=backend)
  return jnp.concatenate([rope(x[..., :rotary_dim], cos, sin, backend=backend), x[..., rotary_dim:]], axis=-1)


def sinusoidal(positions: Int[Array, "B T"], dim: int, theta: float = 10000.0) -> Float[Array, "B T D"]:
  """sin in the first half, cos in the second (Vaswani et al., arXiv 1706.03762, section 3.5)."""
  frequencies = theta ** (-np.arange(dim // 2) / (dim // 2))
  angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def alibi_slopes(num_heads: int) -> np.ndarray:
  """A slope per head [N]: a geometric sequence, interleaved when N is no power of two (arXiv 2108.12409)."""
  power = 2 ** math.floor(math.log2(num_heads))
  slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
  extra = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power), 2))
  return np.concatenate([slopes, extra]).astype(np.float32)


def signed_buckets(c: ModelConfig, length: int) -> Int[Array, "T T"]:
  """Which of 2 R vectors stands for the distance from each token to each other; before the middle for those after it.

  Distances up to R / 2 have one each, those farther away share them logarithmically (DeBERTa v2's code).
  """
  span, middle = c.relative_buckets, c.relative_buckets // 2
  away = np.arange(length)
  steps = np.log(np.maximum(away, middle).astype(np.float32) / np.float32(middle))
  steps = np.ceil(steps / np.log(np.float32((c.relative_max_distance - 1) / middle)) * (middle - 1)) + middle
  bucket_of = np.where(away <= middle, away, steps).astype(np.int32)
  distance = away[:, None] - away
  return jnp.asarray(np.clip(np.sign(distance) * bucket_of[abs(distance)] + span, 0, 2 * span - 1))


def relative_bias(
  c: ModelConfig, table: Float[Array, "R N"], queries: Int[Array, "#B T"], num_keys: int
) -> Float[Array, "#B N T S"]:
  """What is added to the scores of queries in these slots and keys in the slots from 0 on; float32.

  Distances share R buckets: one each for the near ones, growing logarithmically for those farther away; an
  encoder spends half of them on keys after the query (T5, arXiv 1910.10683, section 2.1, and its code).
  """
  distance = queries[:, :, None] - jnp.arange(num_keys)
  buckets = c.relative_buckets
  first: int | Array = 0
  if c.architecture == "encoder":
    buckets //= 2
    first = jnp.where(distance < 0, buckets, 0)
    distance = jnp.abs(distance)
  distance = jnp.maximum(distance, 0)
  exact = buckets // 2
  # A table made on the host: a device's logarithm may fall on the other side of a boundary.
  farthest = np.arange(c.relative_max_distance + 1)
  steps = np.log(np.maximum(farthest, 1) / exact) / math.log(c.relative_max_distance / exact)
  far = np.minimum(exact + (steps * (buckets - exact)).astype(np.int32), buckets - 1)
  bucket_of = jnp.asarray(np.where(farthest < exact, farthest, far), jnp.int32)
  bucket = first + bucket_of[jnp.minimum(distance, c.relative_max_distance)]
  return jnp.moveaxis(table[bucket], -1, 1)

"""Attention of a few queries to a cache by the C++ kernel (`kernels/cpu/decode.cc`): decoding on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.kernels import cpu_ffi

ROWS = 64  # of a tile; with more, products in blocks are faster


def refuses(rows: int, head_dim: int, dtype) -> str | None:
  """Why the kernel cannot compute tiles of so many rows with keys and values of this dtype, or None."""
  if rows > ROWS:
    return f"up to {ROWS} rows (heads of a key head times new tokens), not {rows}"
  if head_dim % 16:
    return f"head dims of multiples of 16, not {head_dim}"
  if dtype not in (jnp.float32, jnp.bfloat16, jnp.int8):
    return f"keys and values in float32, bfloat16 or int8, not {dtype}"
  if not cpu_ffi.available():
    return cpu_ffi.why_unavailable() or "the C++ kernels are switched off or did not build"
  return None


def attend(
  queries: Float[Array, "M K R H"],
  keys: Array,
  values: Array,
  table: Int[Array, "B max_pages"],
  sequence: Int[Array, " M"],
  position: Int[Array, " M"],
  end: Int[Array, " M"],
  *,
  paged: bool,
  group: int,
  scale: float,
  causal: bool = True,
  window: int | None = None,
  softcap: float | None = None,
  slopes: Float[Array, " N"] | None = None,
  key_scales: Float[Array, "pages K page_size"] | None = None,
  value_scales: Float[Array, "pages K page_size"] | None = None,
  round: bool = False,
) -> tuple[Float[Array, "M K R H"], Float[Array, "M K R"]]:
  """Results and log-sum-exp in float32; zeros and -inf where nothing is seen.

  Args:
    queries: row r of a tile is token r // group, head r % group of its key head.
    keys, values: [pages, K, page_size, H] if `paged`; else [B, S, K, H], of which each row is one page.
    sequence: of each tile, a row of `table`.
    position: of a tile's first token; it sees keys up to its own if `causal`, the nearest `window` of them.
    end: keys at and after this position are not read.
    round: what enters a product of many rows may be rounded to bfloat16.
  """
  none = jnp.zeros(0, jnp.float32)
  real = lambda x: none if x is None else x.astype(jnp.float32)  # noqa: E731
  whole = lambda x: x.astype(jnp.int32)  # noqa: E731
  return cpu_ffi.call(
    "cpu_decode",
    (jax.ShapeDtypeStruct(queries.shape, jnp.float32), jax.ShapeDtypeStruct(queries.shape[:3], jnp.float32)),
    queries.astype(jnp.float32),
    keys,
    values,
    real(key_scales),
    real(value_scales),
    *map(whole, (table, sequence, position, end)),
    real(slopes),
    paged=paged,
    causal=causal,
    group=np.int64(group),
    window=np.int64(window or 0),
    scale=np.float32(scale),
    softcap=np.float32(softcap or 0),
    round=round,
  )

"""Paged attention on CPUs by the C++ decoding kernel (`kernels/cpu/decode.cc`)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_decode
from jaxllm.kernels.paged.options import Options, TileShape
from jaxllm.kernels.paged.pages import KVPages
from jaxllm.kernels.paged.schedule import Schedule

TOKENS = 16  # new tokens of a tile when there may be many


def refuses(call, query: Array, pages: KVPages, options: Options) -> str | None:
  """Why this backend cannot compute the call, or None."""
  if query.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
    return f"queries of 16 or 32 bits, not {query.dtype}"
  return cpu_decode.refuses(options.group, query.shape[2], pages.keys.dtype)


def tile_shape(group: int, decoding: bool) -> TileShape:
  """One token a tile when decoding, else as many as the kernel takes."""
  tokens = 1 if decoding else max(1, min(TOKENS, cpu_decode.ROWS // group))
  return TileShape(tokens, tokens * group)


def forward(
  call, queries, pages: KVPages, page_table, schedule: Schedule, options: Options, *, round: bool = True
) -> tuple[Float[Array, "1 M K R H"], Float[Array, "1 M K R"]]:
  """Results in float32 and log-sum-exp of all tiles; the kernel cuts long sequences itself. `round`: with queries of
  bfloat16, keys and values may be of bfloat16 too."""
  out, lse = cpu_decode.attend(
    queries,
    pages.keys,
    pages.values,
    page_table,
    schedule.sequence,
    schedule.position,
    schedule.end,
    paged=True,
    group=options.group,
    scale=options.scale,
    window=options.window,
    softcap=options.softcap,
    slopes=options.alibi_slopes,
    key_scales=pages.key_scales,
    value_scales=pages.value_scales,
    round=round and queries.dtype == jnp.bfloat16,
  )
  return out[None], lse[None]

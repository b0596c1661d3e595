"""Flash attention for TPUs: the forward kernel, `refuses`, and how large the tiles are.

One (row of the batch, query head) at a time walks a list of (query block, key block) pairs (`pallas_tpu_blocks`) and
keeps one query block's running maximum, sum and weighted values in vector memory (arXiv 2205.14135, 2307.08691). A
pair that nobody needs is not in the list; a pair that everybody sees pays for no mask.

The chip's exponential is 2^x: one multiplication, of the difference from the maximum, scales and changes base.
Maxima are held in each of 128 lanes, which the vector unit reads without moving them; sums stay apart by lane until
the end. float32 operands are multiplied as float32 (six passes of the matrix unit), bfloat16 ones in one pass.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxllm.kernels.attention import pallas_tpu_blocks as blocks
from jaxllm.kernels.attention.options import Options, unfused
from jaxllm.kernels.attention.pallas_tpu_backward import backward
from jaxllm.kernels.attention.pallas_tpu_call import LOG2E, Call, Tiles, along_lanes, default_tiles, iota, lanes, scaled
from jaxllm.kernels.tpu import LANES

__all__ = ["Tiles", "backward", "forward", "refuses"]

LOWEST = -1e30  # where running maxima start; finite, so that a query that sees nothing stays clear of NaN
SCALAR_BYTES = 512 << 10  # of scalar memory that a list of pairs may take


def refuses(call, query, key, value, options: Options) -> str | None:
  """Why these kernels cannot compute a call, or None; by shapes and dtypes only."""
  if reason := unfused(key, value, options):
    return reason
  if query.dtype not in (jnp.bfloat16, jnp.float32) or key.dtype != query.dtype:
    return f"bfloat16 or float32 throughout, not queries of {query.dtype} and keys of {key.dtype}"
  B, T, _, H = query.shape
  S = key.shape[1]
  if 0 in (B, T, S):
    return "no empty arrays"
  if H > 512:
    return f"head dims up to 512, not {H}"
  tiles = default_tiles(call.target, H, query.dtype)[0].fitted(T, S)
  rows = B if blocks.depends_on_data(options) else 1
  if (pairs := rows * -(-T // tiles.block_q) * -(-S // tiles.block_k)) * 4 > SCALAR_BYTES:
    return f"{pairs} pairs of blocks do not fit the scalar memory"
  return None


def forward(call, query, key, value, options: Options) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """The result, and the logarithm of the sum of the scores' exponentials (nats; -inf where nothing is seen)."""
  call = Call.of(query, key, options, call.target)
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  B, N, T, H = query.shape
  rows = call.tiles.block_q
  out, lse = call.run(
    _forward_kernel,
    "attention_forward",
    {"query": (query, "query"), "key": (key, "key"), "value": (value, "key")},
    results=[((query.shape, query.dtype), "query"), (((B, N, T), jnp.float32), "query")],
    scratch=[(rows, LANES), (rows, LANES), call.sums(rows, H)],
    products=2,
  )
  return jnp.swapaxes(out, 1, 2), lse


def _forward_kernel(step, given, out_ref, lse_ref, top_ref, sum_ref, acc_ref):
  unit, turned = step.call.unit, step.call.turned
  # A number of each query, as it meets acc.
  spread = along_lanes if turned else functools.partial(lanes, width=acc_ref.shape[1])

  @pl.when(step.first)
  def start():
    top, total = jnp.full(top_ref.shape, LOWEST, jnp.float32), jnp.zeros(sum_ref.shape, jnp.float32)
    if "sinks" in given:
      sink = LOG2E / unit * given["sinks"][step.head]
      top = jnp.maximum(top, sink)
      total = jnp.where(iota(sum_ref.shape, 1) == 0, jnp.exp2(scaled(sink - top, unit)), 0.0)
    top_ref[...], sum_ref[...], acc_ref[...] = top, total, jnp.zeros_like(acc_ref)

  def visit(queries, keys, masked):
    value = step.cleared(given["value"][keys, :], "key", keys, masked)
    scores, _, seen = step.scores(given["query"][queries, :], given["key"][keys, :], queries, keys, masked)
    if masked:
      scores = jnp.where(seen, scores, -jnp.inf)
    before = top_ref[queries, :]
    top = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    weights, fade = (jnp.exp2(scaled(x, unit)) for x in (scores - lanes(top, keys.size), before - top))
    apart = [weights[:, lane : lane + LANES] for lane in range(0, keys.size, LANES)]
    top_ref[queries, :], sum_ref[queries, :] = top, fade * sum_ref[queries, :] + functools.reduce(jnp.add, apart)
    place = (slice(None), queries) if turned else (queries, slice(None))
    acc_ref[place] = spread(fade) * acc_ref[place] + step.weigh(weights.astype(value.dtype), value, 1)

  step.visit(visit)

  @pl.when(step.last)
  def finish():
    total = jnp.broadcast_to(sum_ref[...].sum(axis=1, keepdims=True), sum_ref.shape)
    # At least 1, or 0 where nothing is seen: no care for extremes is needed.
    inverse = pltpu.reciprocal(jnp.maximum(total, 1.0), full_range=False)
    out = acc_ref[...] * spread(inverse)
    out_ref[...] = (out.T if turned else out).astype(out_ref.dtype)
    total = along_lanes(total)
    lse_ref[...] = jnp.where(total > 0, along_lanes(top_ref[...]) * (unit / LOG2E) + jnp.log(total), -jnp.inf)

"""Attention for Hopper in Mosaic GPU: the forward pass of FlashAttention-3 (arXiv 2407.08608).

A block computes `warpgroups * block_q` queries of one head. One warpgroup does nothing but ask the copy engine (TMA)
for keys and values, `stages` blocks ahead; the others multiply (wgmma) and keep a running softmax each for its own
`block_q` rows. They take turns: while one computes exponentials another owns the tensor cores. Scores are in
base 2 with the scale folded into the multiply-add in front of exp2; probabilities go from registers straight into the
second product; out leaves through shared memory and TMA. G query heads read one key head, which is never copied.

Blocks of keys that no query of a tile may see are skipped, and only those that some query may not see wholly branch
into the mask (`mosaic_gpu_common`). With a causal order the tiles with most keys start first.

Nothing here has run on a GPU: results are proved in jax's emulator, the machine code by compiling ahead of time. Not
measured, so open: block sizes and stages, taking turns with head dims above 128, 3 warpgroups for 64, and whether a
persistent grid or the next product issued before this block's softmax (FlashAttention-3's second overlap) pays.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels import tuning
from jaxllm.kernels.attention import mosaic_gpu_common as common
from jaxllm.kernels.attention.mosaic_gpu_backward import backward as backward
from jaxllm.kernels.attention.options import Options, unfused
from jaxllm.kernels.hopper import LARGEST_GRID, LOG2E, ROW, TILED, WGMMA


@dataclasses.dataclass(frozen=True)
class Tiles:
  """block_q: queries of one warpgroup; block_kv: keys of one step; stages: key and value blocks in flight."""

  block_q: int = 64
  block_kv: int = 128
  stages: int = 2
  warpgroups: int = 2


def _tiles(head_dim: int, key_arrays: int) -> Tiles:
  """What fits 227 KiB of shared memory and the registers; `head_dim` is a multiple of 64.

  key_arrays: how many masks look at (`common.key_arrays`); two leave too few registers for 128 keys.
  """
  if head_dim == 128 and key_arrays == 2:
    return Tiles(block_kv=64, stages=4)
  return {
    64: Tiles(block_kv=128, stages=4),
    128: Tiles(block_kv=128, stages=2),
    192: Tiles(block_kv=64, stages=3),
    256: Tiles(block_kv=64, stages=2),
  }[head_dim]


def refuses(call, query, key, value, options: Options) -> str | None:
  """Why this backend cannot compute the call, or None."""
  if reason := unfused(key, value, options):
    return reason
  if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
    return f"bfloat16 or float16 throughout, not {query.dtype} and {key.dtype}"
  if query.shape[3] > 256:
    return f"head dims up to 256, not {query.shape[3]}"
  if not (query.size and key.size):
    return "no queries or no keys"
  if query.shape[0] > LARGEST_GRID:
    return f"batches up to {LARGEST_GRID}, not {query.shape[0]}"
  return None


def forward(call, query, key, value, options: Options) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """The result, and the log-sum-exp of each row's scores in nats (sinks included; -inf where nothing is seen)."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  # The copy engine clips and fills whatever ends in the middle of a tile, but rows come eight at a time.
  query, key, value = (common.pad_to(common.pad_to(x, 3, 64), 1, 8) for x in (query, key, value))
  width = query.shape[3]
  masks = (options.query_segments is not None) + (options.key_positions is not None)
  tiles = tuning.tiles("attention_forward", call.target, _tiles(width, masks), head_dim=width, key_arrays=masks)
  rows = tiles.block_q * tiles.warpgroups
  count = pl.cdiv(T, rows)

  inputs = {"query": query, "key": key, "value": value} | common.row_arrays(options)
  if options.sinks is not None:
    inputs["sinks"] = options.sinks.astype(jnp.float32)
  if (of_keys := common.key_arrays(options, tiles.block_kv)) is not None:
    inputs["of_keys"] = of_keys
  if (segments := common.query_arrays(options, rows)) is not None:
    inputs["segments"] = segments
    inputs["ranges"] = common.segment_ranges(segments, of_keys[:, 0], rows, tiles.block_kv)

  stages, warpgroups = tiles.stages, tiles.warpgroups
  blocks = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=TILED)
  scratch = {
    "query_smem": blocks((warpgroups, tiles.block_q, width)),
    "key_smem": blocks((stages, tiles.block_kv, width)),
    "value_smem": blocks((stages, tiles.block_kv, width)),
    "lse_smem": plgpu.SMEM((warpgroups, tiles.block_q), jnp.float32),
    "query_ready": plgpu.Barrier(num_barriers=warpgroups),
    "key_ready": plgpu.Barrier(num_arrivals=1 if of_keys is None else 2, num_barriers=stages),
    "value_ready": plgpu.Barrier(num_barriers=stages),
    "key_done": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    "value_done": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    "turn": plgpu.Barrier(num_barriers=warpgroups),
  }
  if of_keys is not None:
    scratch["of_keys_smem"] = plgpu.SMEM((stages, of_keys.shape[1], tiles.block_kv), jnp.int32)
  out, lse = plgpu.kernel(
    functools.partial(_kernel, options, tiles, tuple(inputs), (T, S, N // K, count)),
    out_type=(
      jax.ShapeDtypeStruct(query.shape, query.dtype),
      jax.ShapeDtypeStruct((B, N, count * rows), jnp.float32),  # whole tiles: rows of it are copied 16 bytes at a time
    ),
    scratch_types=scratch,
    grid=(B, count, N),  # the last runs fastest: heads that share keys are at work together
    grid_names=("batch", "tile", "head"),
    num_threads=warpgroups + 1,
    thread_name="warpgroup",
    kernel_name="attention_forward",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(*inputs.values())
  return out[:, :T, :, :H], lse[..., :T]


def _kernel(options, tiles, names, sizes, *refs, **scratch):
  """One tile of queries of one head: the last warpgroup copies, the others compute."""
  T, S, group, count = sizes
  gmem = dict(zip((*names, "out", "lse"), refs, strict=True))
  rows = tiles.block_q * tiles.warpgroups
  # 504 or 512 in all.
  compute_registers, copy_registers = (240, 24) if tiles.warpgroups == 2 else (160, 32)
  warpgroup = lax.axis_index("warpgroup")

  # Each role works its places out for itself, and again where it needs them late: kept, they would spill.
  def where():
    row, tile, head = (lax.axis_index(name) for name in ("batch", "tile", "head"))
    return row, count - 1 - tile if options.visibility.causal else tile, head

  def work():
    row, tile, _ = where()
    offset, prefix, ranges = common.scalars(gmem, row, tile)
    last = jnp.minimum((tile + 1) * rows, T) - 1
    visits = common.key_visits(options, offset + tile * rows, offset + last, S, tiles.block_kv, prefix, ranges)
    # A tile that sees nothing goes through one block all the same, wholly masked.
    steps = jnp.maximum(visits.count, 1)

    def block_of(step):
      return jnp.minimum(visits.block(step), pl.cdiv(S, tiles.block_kv) - 1)

    return offset, prefix, visits.full_count, steps, block_of

  @pl.when(warpgroup < tiles.warpgroups)
  def _():
    plgpu.set_max_registers(compute_registers, action="increase")
    _compute(options, tiles, S, gmem, where, work(), **scratch)

  @pl.when(warpgroup == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(copy_registers, action="decrease")
    _copy(tiles, gmem, group, where, work(), **scratch)


def _copy(
  tiles, gmem, group, where, work, *, key_smem, value_smem, key_ready, value_ready, key_done, value_done, **rest
):
  """Keys and values of every visited block, each into its slot once all who read the slot are done with it."""
  row, _, head = where()
  *_, count, block_of = work
  head = lax.div(head, jnp.int32(group))

  @pl.loop(0, count)
  def _(step):
    slot = common.slot_of(step, tiles.stages)
    keys = pl.ds(block_of(step) * tiles.block_kv, tiles.block_kv)
    plgpu.barrier_wait(key_done.at[slot])
    plgpu.copy_gmem_to_smem(gmem["key"].at[row, keys, head], key_smem.at[slot], key_ready.at[slot])
    if "of_keys" in gmem:
      plgpu.copy_gmem_to_smem(gmem["of_keys"].at[row, :, keys], rest["of_keys_smem"].at[slot], key_ready.at[slot])
    plgpu.barrier_wait(value_done.at[slot])
    plgpu.copy_gmem_to_smem(gmem["value"].at[row, keys, head], value_smem.at[slot], value_ready.at[slot])


def _compute(options, tiles, S, gmem, where, work, **scratch):
  """The rows of one warpgroup, from their queries to their results."""
  (row, tile, head), warpgroup = where(), lax.axis_index("warpgroup")
  offset, prefix, full_count, count, block_of = work
  first = (tile * tiles.warpgroups + warpgroup) * tiles.block_q
  key_smem, value_smem, turn = scratch["key_smem"], scratch["value_smem"], scratch["turn"]
  key_ready, value_ready = scratch["key_ready"], scratch["value_ready"]
  key_done, value_done = scratch["key_done"], scratch["value_done"]
  query_smem = scratch["query_smem"].at[warpgroup]
  block_q, width = query_smem.shape
  scores_shape = (block_q, tiles.block_kv)
  dtype = query_smem.dtype
  maskable = common.ever_masked(options, S, tiles.block_kv)
  queries = pl.ds(first, block_q)

  plgpu.copy_gmem_to_smem(gmem["query"].at[row, queries, head], query_smem, scratch["query_ready"].at[warpgroup])
  for slot in range(tiles.stages):
    plgpu.barrier_arrive(key_done.at[slot])
    plgpu.barrier_arrive(value_done.at[slot])

  # The tensor cores go round: whoever has the turn weighs its values and multiplies its next keys, then passes on.
  def pass_turn():
    plgpu.barrier_arrive(turn.at[lax.rem(warpgroup + 1, jnp.int32(tiles.warpgroups))])

  def over(rows, shape):
    return lax.broadcast_in_dim(rows, shape, [0])

  def iota(axis):
    return plgpu.broadcasted_iota(jnp.int32, scores_shape, axis, layout=WGMMA)

  slope = gmem["slope"][head] if "slope" in gmem else None
  segments = None
  if "segments" in gmem:
    segments = plgpu.load(gmem["segments"].at[row, queries], layout=ROW, optimized=False)

  def mask(values, block, slot):
    of_keys = lambda i: common.along_columns(scratch["of_keys_smem"].at[slot, i], scores_shape)  # noqa: E731
    of_queries = None if segments is None else lambda: over(segments, scores_shape)
    of_row = common.mask_row(options, prefix, of_keys, of_queries)
    pair = iota(0) + (offset + first), iota(1) + block * tiles.block_kv
    seen = common.seen(options, *pair, S, tiles.block_kv, of_row)
    return jnp.where(seen, values, -jnp.inf)

  def softmax(raw, index, top, total, masked):
    """Probabilities against the new maximum, this and the new sum, and by how much what came before shrinks."""
    block = block_of(index)
    values, factor, _ = common.logits(
      options, raw, lambda: iota(0) + (offset + first), lambda: iota(1) + block * tiles.block_kv, slope
    )
    if masked:
      values = mask(values, block, common.slot_of(index, tiles.stages))
    new_top = jnp.maximum(top, values.max(axis=1) * factor)
    # A row that has seen nothing yet keeps -inf; against 0 its exponentials are 0 and not NaN.
    against = jnp.where(new_top == -jnp.inf, 0.0, new_top) if masked else new_top
    shrink = jnp.exp2(top - against)
    p = jnp.exp2(values * factor - over(against, scores_shape))
    return p, new_top, total * shrink + p.sum(axis=1), shrink

  def release_keys(slot, masked):
    if masked and "of_keys" in gmem:
      plgpu.commit_smem()  # threads have read what the copy engine is to write next
    plgpu.barrier_arrive(key_done.at[slot])

  def rows_of(acc):
    top = plgpu.layout_cast(jnp.full((block_q,), -jnp.inf, jnp.float32), ROW)
    total = plgpu.layout_cast(jnp.zeros((block_q,), jnp.float32), ROW)
    if "sinks" in gmem:  # a logit without a value: the softmax starts from it
      top = plgpu.layout_cast(jnp.full((block_q,), gmem["sinks"][head] * LOG2E, jnp.float32), ROW)
      total += 1.0

    plgpu.barrier_wait(scratch["query_ready"].at[warpgroup])
    pl.when(warpgroup == tiles.warpgroups - 1)(pass_turn)  # the first one's

    def first_scores(scores):
      plgpu.barrier_wait(key_ready.at[0])
      plgpu.barrier_wait(turn.at[warpgroup])
      plgpu.wgmma(scores, query_smem, key_smem.at[0].T)
      pass_turn()
      return scores[...]

    raw = pl.run_scoped(first_scores, plgpu.ACC(scores_shape, jnp.float32))
    p, top, total, _ = softmax(raw, jnp.int32(0), top, total, maskable)
    release_keys(0, maskable)

    def step(index, carry, masked):
      p16, top, total = carry
      slot, before = common.slot_of(index, tiles.stages), common.slot_of(index - 1, tiles.stages)

      def multiply(scores):
        plgpu.barrier_wait(key_ready.at[slot])
        plgpu.barrier_wait(turn.at[warpgroup])
        # Without the barrier the compiler keeps the queries' addresses in registers that masks made of arrays need.
        mine = scratch["query_smem"].at[lax.optimization_barrier(warpgroup)] if "of_keys" in gmem else query_smem
        plgpu.wgmma(scores, mine, key_smem.at[slot].T)
        plgpu.barrier_wait(value_ready.at[before])
        plgpu.wgmma(acc, p16, value_smem.at[before])
        pass_turn()
        return plgpu.wgmma_accumulator_load(scores, wait_n=1)

      raw = pl.run_scoped(multiply, plgpu.ACC(scores_shape, jnp.float32))
      reads = masked and "of_keys" in gmem
      if not reads:
        release_keys(slot, masked)
      # The compiler waits for the second product after the maximum and before the exponentials, wherever this stands;
      # except that masks made of arrays need the registers that the product reads.
      early = acc[...] if reads else None
      p, top, total, shrink = softmax(raw, index, top, total, masked)
      if reads:
        release_keys(slot, masked)
      weighed = acc[...] if early is None else early
      plgpu.barrier_arrive(value_done.at[before])
      acc[...] = weighed * over(shrink, weighed.shape)
      return p.astype(dtype), top, total

    plain = jnp.maximum(full_count, 1) if maskable else count
    carry = lax.fori_loop(1, plain, functools.partial(step, masked=False), (p.astype(dtype), top, total))
    if maskable:
      carry = lax.fori_loop(plain, count, functools.partial(step, masked=True), carry)
    p16, top, total = carry
    last = common.slot_of(count - 1, tiles.stages)
    plgpu.barrier_wait(value_ready.at[last])
    plgpu.wgmma(acc, p16, value_smem.at[last])
    return acc[...], top, total

  acc, top, total = pl.run_scoped(rows_of, plgpu.ACC((block_q, width), jnp.float32))
  (row, tile, head), warpgroup = where(), lax.axis_index("warpgroup")
  queries = pl.ds((tile * tiles.warpgroups + warpgroup) * tiles.block_q, block_q)
  query_smem, lse_smem = (scratch[name].at[warpgroup] for name in ("query_smem", "lse_smem"))
  lse_smem[...] = (top + jnp.log2(total)) * math.log(2)
  acc *= over(1.0 / jnp.where(total > 0, total, 1.0), acc.shape)
  query_smem[...] = acc.astype(dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(query_smem, gmem["out"].at[row, queries, head])
  plgpu.copy_smem_to_gmem(lse_smem, gmem["lse"].at[row, head, queries])
  plgpu.wait_smem_to_gmem(0)

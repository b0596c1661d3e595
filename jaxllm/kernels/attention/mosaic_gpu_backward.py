"""Attention for Hopper in Mosaic GPU: the backward pass, in two kernels without atomics, so the same bits every time.

Both compute the probabilities again from lse, as FlashAttention does (Dao, arXiv 2307.08691, algorithm 2):

    p = exp(score - lse)    dp = d_out value^T    ds = p * (dp - delta)    (times what a soft cap leaves)
    d_query = scale ds key         d_key = scale ds^T query         d_value = p^T d_out

`_query_kernel` owns a tile of queries and walks over the keys that they see; `_key_kernel` owns a tile of keys and
walks over the queries that see them, those of all G query heads of the key head, so that their sum never leaves the
registers. The second works with score^T, because p^T and ds^T are then where wgmma wants its left operand. One
warpgroup only asks the copy engine (TMA) for blocks, `slots` ahead; the others multiply (wgmma), 64 rows each.

dp's accumulator starts from -delta, which saves the subtraction and the registers that hold delta. d_key and d_value
of 64 rows take H registers of a thread together; with head dims above 128 they do not fit beside the scores, so one
warpgroup keeps d_value and another d_key of the same rows (`split`), and both compute the scores.

Nothing here has run on a GPU: results are proved in jax's emulator, the machine code by compiling ahead of time.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels import tuning
from jaxllm.kernels.attention import mosaic_gpu_common as common
from jaxllm.kernels.attention import mosaic_gpu_gradients as shared
from jaxllm.kernels.attention.options import Options
from jaxllm.kernels.hopper import COLUMN, LOG2E, ROW, ROWS, TILED, WGMMA

COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # of a thread


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Of the query kernel: keys of one step, and how many blocks of keys and of values are in flight.

  Of the key kernel: queries of one step, blocks of them in flight, and whether d_key and d_value of the same rows
  belong to two warpgroups.
  """

  keys: int
  key_slots: int
  value_slots: int
  queries: int
  query_slots: int
  split: bool = False
  warpgroups: int = 2


def _tiles(head_dim: int) -> Tiles:
  """What fits 227 KiB of shared memory and 64 Ki registers without spills; `head_dim` is a multiple of 64."""
  return {
    64: Tiles(keys=128, key_slots=3, value_slots=3, queries=64, query_slots=4),
    128: Tiles(keys=128, key_slots=2, value_slots=2, queries=64, query_slots=3),
    192: Tiles(keys=64, key_slots=2, value_slots=2, queries=64, query_slots=2, split=True),
    256: Tiles(keys=64, key_slots=2, value_slots=1, queries=64, query_slots=2, split=True),
  }[head_dim]


def backward(
  call, query, key, value, options: Options, lse, d_out, delta
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Of query, key and value, as `api` says."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  arrays = (query, key, value, d_out.astype(query.dtype))
  query, key, value, d_out = (common.pad_to(common.pad_to(x, 3, 64), 1, 8) for x in arrays)  # TMA's tiles: 8 x 64
  width = query.shape[3]
  tiles = tuning.tiles("attention_backward", call.target, _tiles(width), head_dim=width)
  query_rows, key_rows = ROWS * tiles.warpgroups, ROWS if tiles.split else ROWS * tiles.warpgroups

  # [B, N, 2, whole tiles]: lse in base 2, and what dp starts from. Rows that see nothing, or are not there, get an lse
  # that makes all their probabilities 0.
  longest = max(query_rows, tiles.queries)
  lse = jnp.pad(lse, [(0, 0), (0, 0), (0, -T % longest)], constant_values=-jnp.inf)
  hidden = lse == -jnp.inf
  less_delta = jnp.where(hidden, 0.0, -common.pad_to(delta, 2, longest))
  rows = jnp.stack([jnp.where(hidden, jnp.inf, lse * LOG2E), less_delta], 2).astype(jnp.float32)

  inputs = {"query": query, "key": key, "value": value, "d_out": d_out, "rows": rows} | common.row_arrays(options)
  of_keys = common.key_arrays(options, max(tiles.keys, key_rows))
  of_queries = common.query_arrays(options, longest)
  if of_keys is not None:
    inputs["of_keys"] = of_keys
  ranges: tuple[Any, Any] = (None, None)
  if of_queries is not None:
    inputs["of_queries"] = of_queries
    ranges = (
      common.segment_ranges(of_queries, of_keys[:, 0], query_rows, tiles.keys),
      common.segment_ranges(of_keys[:, 0], of_queries, key_rows, tiles.queries),
    )
  sizes = (T, S, N // K)
  d_query = _query_gradient(options, tiles, sizes, inputs, ranges[0])
  d_key, d_value = _key_gradients(options, tiles, sizes, inputs, ranges[1])
  return d_query[:, :T, :, :H], d_key[:, :S, :, :H], d_value[:, :S, :, :H]


# ---------------------------------------------------------------- d_query


def _query_gradient(options, tiles, sizes, inputs, ranges):
  query, of_keys = inputs["query"], inputs.get("of_keys")
  B, T, N, H = query.shape
  warpgroups = tiles.warpgroups
  if ranges is not None:
    inputs = inputs | {"ranges": ranges}
  blocks = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=TILED)
  scratch = {
    "query_smem": blocks((warpgroups, ROWS, H)),
    "d_out_smem": blocks((warpgroups, ROWS, H)),
    "key_smem": blocks((tiles.key_slots, tiles.keys, H)),
    "value_smem": blocks((tiles.value_slots, tiles.keys, H)),
    "rows_ready": plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
    "key_ready": plgpu.Barrier(num_arrivals=1 if of_keys is None else 2, num_barriers=tiles.key_slots),
    "value_ready": plgpu.Barrier(num_barriers=tiles.value_slots),
    "key_done": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=tiles.key_slots),
    "value_done": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=tiles.value_slots),
  }
  if of_keys is not None:
    scratch["of_keys_smem"] = plgpu.SMEM((tiles.key_slots, of_keys.shape[1], tiles.keys), jnp.int32)
  outputs = {"d_query": jax.ShapeDtypeStruct(query.shape, query.dtype)}
  grid = {"batch": B, "tile": pl.cdiv(T, ROWS * warpgroups), "head": N}  # the last runs fastest: heads share keys
  return shared.call(_query_kernel, "attention_d_query", options, tiles, sizes, inputs, outputs, scratch, grid)[0]


def _query_kernel(options, tiles, sizes, gmem, **scratch):
  """One tile of queries of one head: the last warpgroup copies, the others compute."""
  T, S, group = sizes
  row, tile, head, warpgroup = (lax.axis_index(name) for name in ("batch", "tile", "head", "warpgroup"))
  size = ROWS * tiles.warpgroups
  if options.visibility.causal:  # the tiles with most keys start first
    tile = pl.cdiv(T, size) - 1 - tile

  def visits(offset, prefix, ranges):
    start, end = offset + tile * size, offset + jnp.minimum((tile + 1) * size, T)
    return common.key_visits(options, start, end - 1, S, tiles.keys, prefix, ranges)

  @pl.when(warpgroup < tiles.warpgroups)
  def _():
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    offset, prefix, ranges = common.scalars(gmem, row, tile)
    place = (row, head, warpgroup, tile * size + warpgroup * ROWS, offset, prefix)
    _query_compute(options, tiles, S, gmem, place, visits(offset, prefix, ranges), **scratch)

  @pl.when(warpgroup == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    plgpu.copy_gmem_to_smem(gmem["counting"], scratch["counting_smem"], scratch["counting_ready"])
    _query_copy(tiles, gmem, row, lax.div(head, jnp.int32(group)), visits(*common.scalars(gmem, row, tile)), **scratch)


def _query_copy(tiles, gmem, row, head, visits, *, key_smem, value_smem, key_ready, value_ready, **rest):
  """Keys and values of every visited block, each into its slot once all who read the slot are done with it."""

  @pl.loop(0, visits.count)
  def _(step):
    keys = pl.ds(visits.block(step) * tiles.keys, tiles.keys)
    slot = common.slot_of(step, tiles.key_slots)

    @pl.when(step >= tiles.key_slots)
    def _():
      plgpu.barrier_wait(rest["key_done"].at[slot])

    plgpu.copy_gmem_to_smem(gmem["key"].at[row, keys, head], key_smem.at[slot], key_ready.at[slot])
    if "of_keys" in gmem:
      plgpu.copy_gmem_to_smem(gmem["of_keys"].at[row, :, keys], rest["of_keys_smem"].at[slot], key_ready.at[slot])
    slot = common.slot_of(step, tiles.value_slots)

    @pl.when(step >= tiles.value_slots)
    def _():
      plgpu.barrier_wait(rest["value_done"].at[slot])

    plgpu.copy_gmem_to_smem(gmem["value"].at[row, keys, head], value_smem.at[slot], value_ready.at[slot])


def _query_compute(options, tiles, S, gmem, place, visits, **scratch):
  """The rows of one warpgroup, from their queries to their gradients."""
  row, head, warpgroup, first, offset, prefix = place
  query_smem, d_out_smem = scratch["query_smem"].at[warpgroup], scratch["d_out_smem"].at[warpgroup]
  key_smem, value_smem = scratch["key_smem"], scratch["value_smem"]
  rows_ready = scratch["rows_ready"].at[warpgroup]
  queries = pl.ds(first, ROWS)
  shape = (ROWS, tiles.keys)

  plgpu.copy_gmem_to_smem(gmem["query"].at[row, queries, head], query_smem, rows_ready)
  plgpu.copy_gmem_to_smem(gmem["d_out"].at[row, queries, head], d_out_smem, rows_ready)

  def of_each(ref):
    return plgpu.load(ref, layout=ROW, optimized=False)

  def over(x):
    return lax.broadcast_in_dim(x, shape, [0])

  def places(start):  # of keys
    counting = plgpu.load(scratch["counting_smem"].at[pl.ds(0, tiles.keys)], layout=COLUMN)
    return lax.broadcast_in_dim(counting + start, shape, [1])

  lse, less_delta = (of_each(gmem["rows"].at[row, head, i, queries]) for i in range(2))
  segments = of_each(gmem["of_queries"].at[row, queries]) if "of_queries" in gmem else None
  slope = gmem["slope"][head] if "slope" in gmem else None

  def mask_row(slot):
    of_keys = lambda i: common.along_columns(scratch["of_keys_smem"].at[slot, i], shape)  # noqa: E731
    return common.mask_row(options, prefix, of_keys, None if segments is None else lambda: over(segments))

  def step(d_query, index):
    block = visits.block(index)
    query_smem, d_out_smem = shared.mine(scratch, "query_smem", "d_out_smem", warpgroup)
    key_slot, value_slot = common.slot_of(index, tiles.key_slots), common.slot_of(index, tiles.value_slots)

    scores = shared.Block(
      options,
      (S, tiles.keys),
      common.ever_masked(options, S, tiles.keys),
      index >= visits.full_count,
      lse=lambda: over(lse),
      query_place=lambda: plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + (offset + first),
      key_place=lambda: places(block * tiles.keys),
      mask_row=lambda: mask_row(key_slot),
      slope=slope,
    )

    def weights(score, dp):
      def second():
        dp[...] = over(less_delta)
        plgpu.barrier_wait(scratch["value_ready"].at[value_slot])
        plgpu.wgmma(dp, d_out_smem, value_smem.at[value_slot].T)

      plgpu.barrier_wait(scratch["key_ready"].at[key_slot])
      score[...] = scores.start(shape)
      plgpu.wgmma(score, query_smem, key_smem.at[key_slot].T)
      _, w = scores.weights(score, second)
      return (w * dp[...]).astype(query_smem.dtype)

    accumulator = plgpu.ACC(shape, jnp.float32)
    ds = pl.run_scoped(weights, accumulator, accumulator)
    plgpu.barrier_arrive(scratch["value_done"].at[value_slot])
    plgpu.wgmma(d_query, ds, key_smem.at[key_slot])
    plgpu.wgmma_wait(0)
    if "of_keys" in gmem:
      plgpu.commit_smem()  # it was read by threads, and TMA will write it
    plgpu.barrier_arrive(scratch["key_done"].at[key_slot])

  def all_steps(d_query):
    pl.loop(0, visits.count)(functools.partial(step, d_query))
    return d_query[...]

  plgpu.barrier_wait(rows_ready)
  plgpu.barrier_wait(scratch["counting_ready"])
  d_query = pl.run_scoped(all_steps, plgpu.ACC(query_smem.shape, jnp.float32))
  query_smem[...] = (d_query * options.scale).astype(query_smem.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(query_smem, gmem["d_query"].at[row, queries, head])
  plgpu.wait_smem_to_gmem(0)


# ---------------------------------------------------------------- d_key and d_value


def _key_gradients(options, tiles, sizes, inputs, ranges):
  key, of_keys = inputs["key"], inputs.get("of_keys")
  B, S, K, H = key.shape
  if ranges is not None:
    inputs = inputs | {"ranges": ranges}
  parts = 1 if tiles.split else tiles.warpgroups
  blocks = functools.partial(plgpu.SMEM, dtype=key.dtype, transforms=TILED)
  slots = tiles.query_slots
  scratch = {
    "key_smem": blocks((parts, ROWS, H)),
    "value_smem": blocks((parts, ROWS, H)),
    "query_smem": blocks((slots, tiles.queries, H)),
    "d_out_smem": blocks((slots, tiles.queries, H)),
    "rows_smem": plgpu.SMEM((slots, 2, tiles.queries), jnp.float32),
    "keys_ready": plgpu.Barrier(num_arrivals=2 if of_keys is None else 3, num_barriers=parts),
    "all_read": plgpu.Barrier(num_arrivals=tiles.warpgroups),
    "query_ready": plgpu.Barrier(num_arrivals=3 if "of_queries" in inputs else 2, num_barriers=slots),
    "d_out_ready": plgpu.Barrier(num_barriers=slots),
    "query_done": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=slots),
    "d_out_done": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=slots),
  }
  if of_keys is not None:
    scratch["of_keys_smem"] = plgpu.SMEM((parts, of_keys.shape[1], ROWS), jnp.int32)
  if "of_queries" in inputs:
    scratch["of_queries_smem"] = plgpu.SMEM((slots, tiles.queries), jnp.int32)
  outputs = {name: jax.ShapeDtypeStruct(key.shape, key.dtype) for name in ("d_key", "d_value")}
  grid = {"batch": B, "head": K, "tile": pl.cdiv(S, ROWS * parts)}
  return shared.call(_key_kernel, "attention_d_key_value", options, tiles, sizes, inputs, outputs, scratch, grid)


def _key_kernel(options, tiles, sizes, gmem, **scratch):
  """One tile of keys of one key head: the last warpgroup copies, the others compute."""
  T, S, group = sizes
  row, tile, head, warpgroup = (lax.axis_index(name) for name in ("batch", "tile", "head", "warpgroup"))
  parts = 1 if tiles.split else tiles.warpgroups
  size = ROWS * parts

  def visits(offset, prefix, ranges):
    end = jnp.minimum((tile + 1) * size, S)
    return common.query_visits(options, tile * size, end - 1, T, tiles.queries, offset, prefix, ranges)

  def compute(part, wanted):
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    offset, prefix, ranges = common.scalars(gmem, row, tile)
    place = (row, head, part, tile * size + part * ROWS, offset, prefix)
    _key_compute(options, tiles, (S, group), gmem, place, visits(offset, prefix, ranges), wanted, **scratch)

  if tiles.split:
    for i, name in enumerate(("d_key", "d_value")):
      pl.when(warpgroup == i)(functools.partial(compute, 0, (name,)))
  else:
    pl.when(warpgroup < tiles.warpgroups)(lambda: compute(warpgroup, ("d_key", "d_value")))

  @pl.when(warpgroup == tiles.warpgroups)
  def _():
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    plgpu.copy_gmem_to_smem(gmem["counting"], scratch["counting_smem"], scratch["counting_ready"])
    for part in range(parts):
      keys = pl.ds(tile * size + part * ROWS, ROWS)
      ready = scratch["keys_ready"].at[part]
      for name in ("key", "value"):
        plgpu.copy_gmem_to_smem(gmem[name].at[row, keys, head], scratch[f"{name}_smem"].at[part], ready)
      if "of_keys" in gmem:
        plgpu.copy_gmem_to_smem(gmem["of_keys"].at[row, :, keys], scratch["of_keys_smem"].at[part], ready)
    _key_copy(tiles, gmem, row, head * group, group, visits(*common.scalars(gmem, row, tile)), **scratch)


def _each_query_block(visits, group, do):
  """do(step, visit, head of the group) for all visits of all heads."""

  def step(index, place):
    visit, head = place
    do(index, visit, head)
    last = visit + 1 == visits.count
    return jnp.where(last, 0, visit + 1), jnp.where(last, head + 1, head)

  lax.fori_loop(0, visits.count * group, step, (jnp.int32(0), jnp.int32(0)))


def _key_copy(tiles, gmem, row, first_head, group, visits, *, query_ready, d_out_ready, **rest):
  """What belongs to the queries of every visited block, head after head, each into its slot once that is free."""

  @functools.partial(_each_query_block, visits, group)
  def _(step, visit, head):
    head += first_head
    queries = pl.ds(visits.block(visit) * tiles.queries, tiles.queries)
    slot = common.slot_of(step, tiles.query_slots)

    @pl.when(step >= tiles.query_slots)
    def _():
      plgpu.barrier_wait(rest["query_done"].at[slot])

    plgpu.copy_gmem_to_smem(gmem["query"].at[row, queries, head], rest["query_smem"].at[slot], query_ready.at[slot])
    plgpu.copy_gmem_to_smem(gmem["rows"].at[row, head, :, queries], rest["rows_smem"].at[slot], query_ready.at[slot])
    if "of_queries" in gmem:
      smem = rest["of_queries_smem"].at[slot]
      plgpu.copy_gmem_to_smem(gmem["of_queries"].at[row, queries], smem, query_ready.at[slot])

    @pl.when(step >= tiles.query_slots)
    def _():
      plgpu.barrier_wait(rest["d_out_done"].at[slot])

    plgpu.copy_gmem_to_smem(gmem["d_out"].at[row, queries, head], rest["d_out_smem"].at[slot], d_out_ready.at[slot])


def _key_compute(options, tiles, sizes, gmem, place, visits, wanted, **scratch):
  """`wanted`, of "d_key" and "d_value", for the 64 keys of one warpgroup."""
  S, group = sizes
  row, head, part, first, offset, prefix = place
  key_smem, value_smem = scratch["key_smem"].at[part], scratch["value_smem"].at[part]
  dtype = key_smem.dtype
  keys = pl.ds(first, ROWS)
  shape = (ROWS, tiles.queries)
  accumulator = plgpu.ACC(shape, jnp.float32)

  def over(ref, plus=0):  # a number for each query, over all keys
    return lax.broadcast_in_dim(plgpu.load(ref, layout=COLUMN) + plus, shape, [1])

  def of_each(ref):  # a number for each key, over all queries
    return lax.broadcast_in_dim(plgpu.load(ref, layout=ROW), shape, [0])

  def mask_row(slot):
    of_queries = (lambda: over(scratch["of_queries_smem"].at[slot])) if "of_queries" in gmem else None
    of_keys = lambda i: of_each(scratch["of_keys_smem"].at[part, i])  # noqa: E731
    return common.mask_row(options, prefix, of_keys, of_queries)

  def step(gradients, index, visit, head_of_group):
    block = visits.block(visit)
    key_smem, value_smem = shared.mine(scratch, "key_smem", "value_smem", part)
    slope = gmem["slope"][head * group + head_of_group] if "slope" in gmem else None
    slot = common.slot_of(index, tiles.query_slots)
    query_smem, d_out_smem = scratch["query_smem"].at[slot], scratch["d_out_smem"].at[slot]
    rows_smem = scratch["rows_smem"].at[slot]

    scores = shared.Block(
      options,
      (S, 1),  # none is short: keys behind the last have rows of their own, which are not stored
      common.ever_masked(options, S, 1),
      visit >= visits.full_count,
      lse=lambda: over(rows_smem.at[0]),
      query_place=lambda: over(scratch["counting_smem"].at[pl.ds(0, tiles.queries)], offset + block * tiles.queries),
      key_place=lambda: plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA) + first,
      mask_row=lambda: mask_row(slot),
      slope=slope,
    )

    def products(score, dp=None):
      def second():
        if dp is not None:
          dp[...] = over(rows_smem.at[1])
        plgpu.barrier_wait(scratch["d_out_ready"].at[slot])
        if dp is not None:
          plgpu.wgmma(dp, value_smem, d_out_smem.T)

      plgpu.barrier_wait(scratch["query_ready"].at[slot])
      score[...] = scores.start(shape)
      plgpu.wgmma(score, key_smem, query_smem.T)
      p, w = scores.weights(score, second, products=0 if dp is None else 1)
      if "d_value" in gradients:
        plgpu.wgmma(gradients["d_value"], p.astype(dtype), d_out_smem)
      if dp is not None:
        # dp is the first of those under way: ds is computed beside the product for d_value.
        ds = (w * plgpu.wgmma_accumulator_load(dp, wait_n=len(gradients) - 1)).astype(dtype)
        plgpu.wgmma(gradients["d_key"], ds, query_smem)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(scratch["d_out_done"].at[slot])
      plgpu.wgmma_wait(0)
      if dp is None:
        plgpu.barrier_arrive(scratch["d_out_done"].at[slot])
      plgpu.commit_smem()  # `rows_smem` was read by threads, and TMA will write it
      plgpu.barrier_arrive(scratch["query_done"].at[slot])

    pl.run_scoped(products, *[accumulator] * (2 if "d_key" in wanted else 1))

  def all_steps(*refs):
    gradients = dict(zip(wanted, refs, strict=True))
    _each_query_block(visits, group, functools.partial(step, gradients))
    return [ref[...] for ref in refs]

  plgpu.barrier_wait(scratch["keys_ready"].at[part])
  plgpu.barrier_wait(scratch["counting_ready"])
  results = pl.run_scoped(all_steps, *(plgpu.ACC(key_smem.shape, jnp.float32) for _ in wanted))
  if tiles.split:  # the other warpgroup reads the same keys and values, where the results go out
    plgpu.barrier_arrive(scratch["all_read"])
    plgpu.barrier_wait(scratch["all_read"])
  for name, result in zip(wanted, results, strict=True):
    smem = key_smem if name == "d_key" else value_smem
    smem[...] = (result * options.scale if name == "d_key" else result).astype(dtype)
  plgpu.commit_smem()
  for name in wanted:
    plgpu.copy_smem_to_gmem(key_smem if name == "d_key" else value_smem, gmem[name].at[row, keys, head])
  plgpu.wait_smem_to_gmem(0)

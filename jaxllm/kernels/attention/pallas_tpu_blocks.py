"""Which pairs of a query block and a key block a TPU kernel visits, and in what order.

A grid over all pairs would fetch and step through blocks that nobody sees. Instead the kernel gets the list of the
pairs it needs, in scalar memory, where both the fetches and the computation find it. Where the list depends on shapes
only (causal order, windows) it is a constant; where it depends on data (segments, prefixes, offsets) it is computed
from the extremes of each block, which costs (T / block) * (S / block) and not T * S.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxllm.kernels.attention.options import Options

# One int32 for each pair: four flags, 14 bits of the query block, 13 of the key block.
FIRST, LAST, RUN, MASK = 1, 2, 4, 8
FLAGS = 15
MAX_QUERY_BLOCKS, MAX_KEY_BLOCKS = 1 << 14, 1 << 13


def place(entry):
  """(query block, key block) of an entry."""
  return (entry >> 4) & (MAX_QUERY_BLOCKS - 1), entry >> 18


def depends_on_data(options: Options) -> bool:
  """May rows of the batch have lists of their own?"""
  arrays = (options.query_offset, options.query_segments, options.prefix_lengths, options.key_positions)
  return any(array is not None for array in arrays)


def pairs(
  options: Options, T: int, S: int, block_q: int, block_k: int, keys_outside: bool, query_sums: bool = False
) -> tuple[Int[Array, "rows entries"], int | Int[Array, ""]]:
  """The list of each row of the batch (one row, if all are alike), and the steps that some row needs.

  Pairs of one query block (of one key block, if keys_outside) follow each other, between FIRST and LAST; a block that
  sees nothing has one entry without RUN, so that its result is written too. MASK: some of the pair's scores are hidden;
  with query_sums also where the last query block is cut short, whose tail would reach the sums over queries.
  A row's list ends with entries that repeat its last place and ask for nothing.
  """
  some, every = extremes(options, T, S, block_q, block_k)
  if S % block_k:
    every = every & (np.arange(some.shape[2]) < S // block_k)
  if query_sums and T % block_q:
    every = every & (np.arange(some.shape[1]) < T // block_q)[:, None]
  if keys_outside:
    some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
  rows, outer, inner = some.shape
  needed = (some | (~some.any(2, keepdims=True) & (np.arange(inner) == 0))).reshape(rows, -1)
  count = needed.sum(1, keepdims=True)
  order: Any
  xp: Any
  if isinstance(needed, np.ndarray):
    order, xp = np.flatnonzero(needed[0])[None], np
    steps = length = order.shape[1]
  else:
    order, xp = jnp.argsort(~needed, axis=1, stable=True), jnp
    steps, length = count.max(), outer * inner
  real = np.arange(length) < count
  order = xp.take_along_axis(order, xp.minimum(np.arange(length), count - 1), 1)
  at, to = order // inner, order % inner
  edge = np.full((rows, 1), True)
  changes = at[:, 1:] != at[:, :-1]
  first, last = xp.concatenate([edge, changes], 1), xp.concatenate([changes, edge], 1)
  last = last | (np.arange(length) == count - 1)
  run, unmasked = [xp.take_along_axis(x.reshape(rows, -1), order, 1) for x in (some, every)]
  flags = FIRST * first + LAST * last + RUN * run + MASK * (run & ~unmasked)
  i, j = (to, at) if keys_outside else (at, to)
  return jnp.asarray(flags * real + (i << 4) + (j << 18), jnp.int32), steps


def extremes(
  options: Options, T: int, S: int, block_q: int, block_k: int
) -> tuple[Bool[Array, "B nq nk"], Bool[Array, "B nq nk"]]:
  """May some query of a block see some key of a block, and does every one see every one?

  What `options.visible` says of tokens, said of blocks by their least and greatest members. The first may be true and
  the second false without need, never the other way round. B is 1 where all rows are alike, and then the arrays are
  numpy's.
  """
  v = options.visibility
  q0, k0 = np.arange(0, T, block_q)[None, :, None], np.arange(0, S, block_k)[None, None, :]
  q1, k1 = np.minimum(q0 + block_q, T) - 1, np.minimum(k0 + block_k, S) - 1
  every: Any
  some: Any
  every = np.full((1, q0.size, k0.size), True)
  if options.query_offset is not None:
    q0, q1 = (x + options.query_offset[:, None, None] for x in (q0, q1))
  low, high = k0, k1
  prefix: Any = None
  if options.key_positions is not None:
    low, high = (x[:, None, :] for x in _ends(options.key_positions, block_k))
  if options.prefix_lengths is not None:
    prefix = options.prefix_lengths[:, None, None]
  some = every & near(options, q0, q1, k0, k1, low, prefix)
  if v.window is not None:
    every = every & (q1 - k0 < v.window) & (k1 - q0 < v.window)
    if v.sink_tokens:
      every = every | (high < v.sink_tokens)
  if v.causal:
    every = every & (k1 <= q0)
  if prefix is not None:
    every = every | (k1 < prefix)
  if options.query_segments is not None:
    of_queries, of_keys = options.query_segments, options.key_segments
    # Padding sees nothing, so it does not widen a block's range of segments.
    a, b = (_ends(ids, size, skip_zero=True) for ids, size in ((of_queries, block_q), (of_keys, block_k)))
    some = some & (a[0][:, :, None] <= b[1][:, None, :]) & (b[0][:, None, :] <= a[1][:, :, None])
    a, b = _ends(of_queries, block_q), _ends(of_keys, block_k)
    one = (a[0] == a[1])[:, :, None] & (b[0] == b[1])[:, None, :]
    every = every & one & (a[0][:, :, None] == b[0][:, None, :]) & (b[0] != 0)[:, None, :]
  return some, every


def near(options: Options, q0, q1, k0, k1, low, prefix):
  """May queries between two places see keys between two places, segments apart?

  low: the least position of these keys. prefix: length of the row's prefix, or None.
  """
  v = options.visibility
  some: Any = True
  if v.window is not None:
    some = (q0 - k1 < v.window) & (k0 - q1 < v.window)
    if v.sink_tokens:
      some = some | (low < v.sink_tokens)
  if v.causal:
    some = some & (k0 <= q1)
  if prefix is not None:
    some = some | (k0 < prefix)
  return some


def _ends(ids: Int[Array, "B L"], block: int, skip_zero: bool = False):
  """Least and greatest of each block [B, L / block]."""
  biggest, smallest = np.iinfo(ids.dtype).max, np.iinfo(ids.dtype).min
  low = high = ids
  if skip_zero:
    low, high = jnp.where(ids == 0, biggest, ids), jnp.where(ids == 0, smallest, ids)
  pad = ((0, 0), (0, -ids.shape[1] % block))
  low, high = jnp.pad(low, pad, constant_values=biggest), jnp.pad(high, pad, constant_values=smallest)
  blocked = (ids.shape[0], -1, block)
  return low.reshape(blocked).min(2), high.reshape(blocked).max(2)

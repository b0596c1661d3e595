"""Paged attention for TPU: pages are copied to vector memory one step ahead of the arithmetic, across tiles too.

The grid walks over tiles. Tables and lengths are scalars that are there before the kernel starts, so that each step
asks for the pages of the next one, be it of the same tile or the first of the next (as in Ragged Paged Attention,
arXiv 2604.15464). A page comes with all its key heads in one contiguous copy; each head's queries, G times the tokens
of the tile, are one matrix. int8 and fp8 pages are widened in registers; scales multiply scores and probabilities.

Heads that share a row of 128 lanes (`pages.lanes_of`) are computed together: their queries lie one below the other,
each in its head's lanes with zeros beside. The matrix unit is 128 deep in any case, so that costs no more products
than padding each head would, and half the copies or less.

A core walks over its tiles one after another and its copies never pause between them, so that cutting long sequences
into parts gives it nothing to do side by side. v4 and v5p have two cores in a device: they share the tiles, or, of an
odd number (one long sequence), the keys of each tile. v7's two cores are devices of their own.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxllm.kernels.paged.options import LOWEST, Options, TileShape, slope_rows
from jaxllm.kernels.paged.pages import KVPages
from jaxllm.kernels.paged.schedule import Schedule
from jaxllm.kernels.tpu import LANES, VMEM, dot

TWO_CORES = ("v4", "v5p")  # in one device


def _block(groups: int, lanes: int, itemsize: int, page_size: int) -> int:
  """Keys of one step, all heads; a multiple of 128 and of the page size. About 1 MiB: copies long enough to hide their
  start, and room for two steps of keys and values."""
  unit = max(page_size, LANES)
  token = groups * lanes * itemsize
  return min(max((1 << 20) // token // unit, 1) * unit, max(512, unit))


def tile_shape(group: int, decoding: bool) -> TileShape:
  """Tokens and rows of a tile: as many as the matrix unit is wide, or one token of each sequence."""
  tokens = 1 if decoding else max(1, 128 // group)
  return TileShape(tokens, -(-tokens * group // 16) * 16)


def refuses(call, query: Array, pages: KVPages, options: Options) -> str | None:
  """Why this backend cannot compute the call, or None."""
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"queries in bfloat16 or float32, not {query.dtype}"
  size, quantized = pages.page_size, pages.key_scales is not None
  if not quantized and pages.keys.dtype != query.dtype:
    return f"pages of the queries' dtype, int8 or float8_e4m3fn, not {pages.keys.dtype}"
  smallest = LANES if quantized else 16
  if size % smallest or (size < LANES and LANES % size):
    return f"pages of a multiple of {smallest} tokens (below 128: a power of two), not {size}"
  if pages.keys.shape[3] % LANES:
    return f"rows of a multiple of {LANES}, not {pages.keys.shape[3]}: pages of KVPages.zeros(target=a TPU)"
  if not (query.size and pages.keys.size):
    return "no queries or no pages"
  return None


def forward(
  call, queries, pages: KVPages, page_table, schedule: Schedule, options: Options
) -> tuple[Float[Array, "P M K R H"], Float[Array, "P M K R"]]:
  """Results and log-sum-exp of all tiles; in one part, unless two cores have to share an odd number of tiles."""
  num_kv_heads, head_rows = queries.shape[1:3]
  queries = _beside(queries, pages)
  M, K, R, H = queries.shape  # from here on heads that share a row are one
  size, max_pages = pages.page_size, page_table.shape[1]
  block, cores = _block(K, H, pages.keys.dtype.itemsize, size), 2 if call.target in TWO_CORES else 1
  parts = call.options or (cores if M % cores else 1)
  walks = cores if parts == 1 and M % cores == 0 else parts  # of the grid: shares of the tiles, or of their keys
  per_walk = M // walks if parts == 1 else M
  scalars = [page_table.reshape(-1), schedule.sequence, schedule.position, jnp.maximum(schedule.end, 1)]
  inputs: dict[str, Array | None] = {"query": queries, "keys": pages.keys, "values": pages.values}
  buffer = pltpu.VMEM((2, K, block, H), pages.keys.dtype)
  scratch = {"keys_vmem": buffer, "values_vmem": buffer}
  if pages.key_scales is not None:
    inputs |= {"key_scales": pages.key_scales, "value_scales": pages.value_scales}
    scales = pltpu.VMEM((2, num_kv_heads, block), jnp.float32)
    scratch |= {f"{name}_vmem": scales for name in ("key_scales", "value_scales")}
  copied = [name.removesuffix("_vmem") for name in scratch]
  if options.alibi_slopes is not None:
    rows = slope_rows(options.alibi_slopes, num_kv_heads, head_rows, schedule.tokens)
    missing = K * pages.together - num_kv_heads
    rows = {name: jnp.pad(x, ((0, missing), (0, 0))).reshape(K, R, 1) for name, x in rows.items()}
    inputs |= {name: jnp.broadcast_to(x, (K, R, LANES)) for name, x in rows.items()}
  scratch |= {
    "acc": pltpu.VMEM((K, R, H), jnp.float32),
    "top": pltpu.VMEM((K, R, LANES), jnp.float32),
    "total": pltpu.VMEM((K, R, LANES), jnp.float32),
    "arrived": pltpu.SemaphoreType.DMA((2, len(copied))),
    "slot": pltpu.SMEM((1,), jnp.int32),
  }

  def tile(walk, i):
    return i if parts > 1 else walk * per_walk + i

  def part(walk):
    return walk if parts > 1 else 0

  def spec(name, array):
    if name in copied:
      return pl.BlockSpec(memory_space=pltpu.HBM)
    if name == "query":
      return pl.BlockSpec((None, K, R, H), lambda walk, i, *_: (tile(walk, i), 0, 0, 0))
    return pl.BlockSpec(array.shape, lambda *_: (0, 0, 0))

  static = block, size, max_pages, per_walk, parts, head_rows
  keys = M * max_pages * size
  cost = pl.CostEstimate(
    flops=4 * keys * K * R * H,
    transcendentals=keys * K * R,
    bytes_accessed=2 * keys * K * H * pages.keys.dtype.itemsize + 2 * queries.size * queries.dtype.itemsize,
  )
  out, lse = pl.pallas_call(
    functools.partial(_kernel, options, static, copied, (tuple(inputs), tuple(scratch))),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(walks, per_walk),
      in_specs=[spec(name, array) for name, array in inputs.items()],
      out_specs=[
        pl.BlockSpec((None, None, K, R, H), lambda walk, i, *_: (part(walk), tile(walk, i), 0, 0, 0)),
        pl.BlockSpec((None, None, K, R), lambda walk, i, *_: (part(walk), tile(walk, i), 0, 0)),
      ],
      scratch_shapes=list(scratch.values()),
    ),
    out_shape=[
      jax.ShapeDtypeStruct((parts, *queries.shape), queries.dtype if parts == 1 else jnp.float32),
      jax.ShapeDtypeStruct((parts, M, K, R), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM.get(call.target, 15 << 20)
    ),
    cost_estimate=cost,
    name="paged_attention",
  )(*scalars, *inputs.values())
  return _apart(out, pages), lse.reshape(parts, M, -1, head_rows)[:, :, :num_kv_heads]


def _beside(queries, pages):
  """[M, K, R, H] -> [M, groups, together * R, lanes]: each head's queries in the lanes of its keys."""
  if not pages.heads:
    return queries
  (M, K, R, H), n = queries.shape, pages.together
  _, groups, _, lanes = pages.keys.shape
  queries = jnp.pad(queries, ((0, 0), (0, groups * n - K), (0, 0), (0, 0))).reshape(M, groups, n, R, 1, H)
  own = jnp.eye(n, dtype=bool)[:, None, :, None]
  rows = jnp.where(own, queries, 0).reshape(M, groups, n * R, n * H)
  return jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, lanes - n * H)))


def _apart(out, pages):
  """[P, M, groups, together * R, lanes] -> [P, M, K, R, H]: of each head's rows the lanes of its values."""
  if not pages.heads:
    return out
  (K, H), n = pages.heads, pages.together
  *outer, groups, rows, _ = out.shape
  out = out[..., : n * H].reshape(*outer, groups, n, rows // n, n, H)
  return jnp.stack([out[..., j, :, j, :] for j in range(n)], 3).reshape(*outer, groups * n, rows // n, H)[:, :, :K]


def _kernel(options, static, copied, names, table, sequences, positions, ends, *refs):
  """One tile: all its heads, block of keys by block of keys."""
  block, size, max_pages, per_walk, parts, head_rows = static
  refs = dict(zip((*names[0], "out", "lse", *names[1]), refs, strict=True))
  slot_ref, pages = refs["slot"], block // size
  walk, at = pl.program_id(0), pl.program_id(1)
  tile = at if parts > 1 else walk * per_walk + at

  def blocks(tile):
    """From and to which block this walk goes; a part may have none."""
    first, last = 0, pl.cdiv(ends[tile], block)
    if options.window is not None:
      first = lax.div(jnp.maximum(positions[tile] - (options.window - 1), 0), jnp.int32(block))
    if parts == 1:
      return first, last
    cut = lambda n: first + lax.div((last - first) * n, jnp.int32(parts))  # noqa: E731
    return cut(walk), cut(walk + 1)

  def copies(tile, index, slot, act):
    """Starts or awaits the copies of one block's pages, those that hold keys."""
    for i in range(pages):
      page = index * pages + i

      @pl.when(page * size < ends[tile])
      def _(i=i, page=page):
        row = table[sequences[tile] * max_pages + page]
        for n, name in enumerate(copied):
          buffer = refs[f"{name}_vmem"].at[slot, :, pl.ds(i * size, size)]
          act(pltpu.make_async_copy(refs[name].at[row], buffer, refs["arrived"].at[slot, n]))

  def start(tile, index, slot):
    copies(tile, index, slot, lambda copy: copy.start())

  @pl.when(at == 0)
  def _():
    slot_ref[0] = 0
    start(tile, blocks(tile)[0], 0)

  refs["acc"][...] = jnp.zeros_like(refs["acc"])
  refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
  refs["total"][...] = jnp.zeros_like(refs["total"])
  first, last = blocks(tile)
  position = positions[tile]
  if parts > 1:  # each walks over one block at least, whose copies are under way; where none is its own it sees no key
    position = jnp.where(last > first, position, -refs["query"].shape[1])
    last = jnp.maximum(last, first + 1)

  def step(index, _):
    slot = slot_ref[0]

    @pl.when(index + 1 < last)
    def _():
      start(tile, index + 1, 1 - slot)

    @pl.when((index + 1 == last) & (at + 1 < per_walk))
    def _():
      start(tile + 1, blocks(tile + 1)[0], 1 - slot)

    copies(tile, index, slot, lambda copy: copy.wait())
    _attend_block(options, head_rows, refs, slot, index * block, position, ends[tile])
    slot_ref[0] = 1 - slot

  lax.fori_loop(first, last, step, None)
  for k in range(refs["acc"].shape[0]):
    total = refs["total"][k]
    share = 1.0 / jnp.where(total > 0, total, 1.0)
    refs["out"][k] = (refs["acc"][k] * share[:, :1]).astype(refs["out"].dtype)
    refs["lse"][k] = (refs["top"][k] + jnp.log(total)).T[0]  # v4 cannot gather what lies along sublanes


def _attend_block(options, head_rows, refs, slot, start, position, end):
  """The running softmax of every head goes on by one block, whose first key is at `start`."""
  keys, values, query = refs["keys_vmem"], refs["values_vmem"], refs["query"]
  K, R, H = query.shape
  block, dtype = keys.shape[2], query.dtype
  # Row r of a head is token r // G, at position + r // G: compared without dividing.
  row = lax.broadcasted_iota(jnp.int32, (R, block), 0)
  if head_rows < R:
    row = lax.rem(row, jnp.int32(head_rows))
  ahead = lax.broadcasted_iota(jnp.int32, (R, block), 1) + (start - position)
  seen = ahead * options.group <= row
  if options.window is not None:
    seen &= row < (ahead + options.window) * options.group
  written = lax.broadcasted_iota(jnp.int32, (1, block), 1) < end - start

  def scales(name, k):  # of the heads that share a row, over the rows of each
    heads, n = refs[f"{name}_vmem"], R // head_rows
    each = [heads[slot, pl.ds(min(k * n + j, heads.shape[1] - 1), 1)] for j in range(n)]
    if n == 1:
      return each[0]
    return jnp.concatenate([jnp.broadcast_to(x, (head_rows, block)) for x in each])

  if "key_scales" not in refs:

    @pl.when(start + block > end)  # slots that no token was written to: 0 times NaN would be NaN
    def _():
      for k in range(K):
        held = lax.broadcasted_iota(jnp.int32, (block, H), 0) < end - start
        values[slot, k] = jnp.where(held, values[slot, k].astype(jnp.float32), 0.0).astype(values.dtype)

  for k in range(K):
    scores = dot(query[k], keys[slot, k].astype(dtype), (1, 1))
    if "key_scales" in refs:
      scores *= scales("key_scales", k)
    scores *= options.scale
    if options.softcap is not None:
      scores = options.softcap * jnp.tanh(scores * (1 / options.softcap))
    if options.alibi_slopes is not None:
      scores += refs["slope"][k][:, :1] * ahead.astype(jnp.float32) - refs["row_bias"][k][:, :1]
    scores = jnp.where(seen, scores, -jnp.inf)
    top = refs["top"][k]
    new_top = jnp.maximum(top, scores.max(axis=1, keepdims=True))
    shrink = jnp.exp(top - new_top)
    p = jnp.exp(scores - new_top[:, :1])
    refs["total"][k] = refs["total"][k] * shrink + p.sum(axis=1, keepdims=True)
    refs["top"][k] = new_top
    value = values[slot, k].astype(dtype)
    if "value_scales" in refs:
      p *= jnp.where(written, scales("value_scales", k), 0.0)
      if not jnp.issubdtype(values.dtype, jnp.integer):  # integers are finite, whoever wrote them
        held = lax.broadcasted_iota(jnp.int32, (block, H), 0) < end - start
        value = jnp.where(held, value.astype(jnp.float32), 0.0).astype(dtype)
    product = dot(p.astype(dtype), value, (1, 0))
    refs["acc"][k] = refs["acc"][k] * shrink[:, :1] + product

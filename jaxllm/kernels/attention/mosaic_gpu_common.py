"""What the Hopper attention kernels share: which blocks they visit, what they read, how a product becomes a logit.

`visible` (in `options`) says who sees whom. The ranges here follow from it: key blocks that no query of a tile may
see are never loaded, and only blocks that some query may not see wholly pay for a mask. A kernel works them out from a
few scalars; only segments need a look at the arrays, which `segment_ranges` takes before the kernel starts.
"""

import dataclasses

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.kernels.attention.options import Options, visible
from jaxllm.kernels.hopper import COLUMN, LOG2E

# ---------------------------------------------------------------- ranges


@dataclasses.dataclass(frozen=True)
class Visits:
  """Blocks that a tile visits: [0, head) and [start, stop), head <= start; of them [full_start, full_stop) unmasked."""

  head: Array
  start: Array
  stop: Array
  full_start: Array
  full_stop: Array

  @property
  def count(self) -> Array:
    return self.head + self.stop - self.start

  @property
  def full_count(self) -> Array:
    """How many of the visited blocks need no mask."""
    return jnp.maximum(self.full_stop - self.full_start, 0)

  def block(self, step: Array) -> Array:
    """Which block the `step`-th visit is for: first the `full_count` that need no mask, then the others in order."""
    before = jnp.where(self.full_start < self.head, self.full_start, self.full_start - self.start + self.head)
    place = jnp.where(step < self.full_count, step + before, step)
    place = jnp.where((step >= self.full_count) & (step < self.full_count + before), step - self.full_count, place)
    return jnp.where(place < self.head, place, place + self.start - self.head)


def ever_masked(options: Options, length: int, block: int) -> bool:
  """Whether any block of `block` keys (of `length`) can need a mask."""
  v = options.visibility
  return v.causal or v.window is not None or options.query_segments is not None or length % block != 0


def key_visits(options: Options, first, last, length: int, block: int, prefix=None, segments=None) -> Visits:
  """Key blocks for the queries at places `first` to `last`, both included (places among the keys, offset added).

  Args:
    length, block: number of keys, and of keys in a block.
    prefix: the row's prefix length, if the options have any.
    segments: the tile's four numbers of `segment_ranges`, if the options have segments.
  """
  v = options.visibility
  head, start, stop, full_start, full_stop = (jnp.int32(x) for x in (0, 0, length, 0, length))
  if v.window is not None:
    start, stop = first - v.window + 1, jnp.minimum(stop, last + v.window)
    full_start, full_stop = last - v.window + 1, jnp.minimum(full_stop, first + v.window)
    if v.sink_tokens and options.key_positions is None:
      head = jnp.int32(min(v.sink_tokens, length))
    elif v.sink_tokens:  # anywhere: documents start in the middle of a packed row
      start, stop = jnp.int32(0), jnp.int32(length)
  if v.causal:
    head, stop, full_stop = jnp.minimum(head, last + 1), jnp.minimum(stop, last + 1), jnp.minimum(full_stop, first + 1)
  if options.prefix_lengths is not None:
    prefix = jnp.clip(prefix, 0, length)
    head = jnp.maximum(head, prefix)
    empty, joined = full_stop <= full_start, prefix >= full_start
    full_start = jnp.where(joined | empty, 0, full_start)
    full_stop = jnp.where(joined, jnp.maximum(full_stop, prefix), jnp.where(empty, prefix, full_stop))
  return _in_blocks(head, start, stop, full_start, full_stop, block, length, segments)


def query_visits(
  options: Options, first, last, length: int, block: int, offset=0, prefix=None, segments=None
) -> Visits:
  """Query blocks for the keys `first` to `last`, both included.

  Args:
    length, block: number of queries, and of queries in a block; the last block may be short.
    offset: place of the first query among the keys.
    prefix, segments: as in `key_visits`.
  """
  v = options.visibility
  head, start, stop, full_start, full_stop = (jnp.int32(x) for x in (0, 0, length, 0, length))
  if v.window is not None:
    stop, full_stop = last + v.window - offset, first + v.window - offset
    if not v.causal:
      start, full_start = first - v.window + 1 - offset, last - v.window + 1 - offset
    if v.sink_tokens:  # a block with a sink is seen from everywhere
      sinks = jnp.bool_(True) if options.key_positions is not None else first < v.sink_tokens
      start, stop = jnp.where(sinks, 0, start), jnp.where(sinks, length, stop)
  if v.causal:
    start, full_start = jnp.maximum(start, first - offset), jnp.maximum(full_start, last - offset)
  if options.prefix_lengths is not None:
    some, every = first < prefix, last < prefix
    start, stop = jnp.where(some, 0, start), jnp.where(some, length, stop)
    full_start, full_stop = jnp.where(every, 0, full_start), jnp.where(every, length, full_stop)
  return _in_blocks(head, start, stop, full_start, full_stop, block, length, segments, short_is_full=True)


def _in_blocks(head, start, stop, full_start, full_stop, block, length, segments, short_is_full=False):
  """Visits from ranges of elements. short_is_full: the last, short block needs no mask of its own."""

  def down(x):
    return lax.div(x, jnp.int32(block))

  def up(x):
    return lax.div(x + (block - 1), jnp.int32(block))

  head, start, stop, full_start, full_stop = (
    jnp.clip(x, 0, length) for x in (head, start, stop, full_start, full_stop)
  )
  stop = jnp.where(stop > start, up(stop), 0)
  head, start, full_start = up(head), down(start), up(full_start)
  full_stop = jnp.where(full_stop >= length, up(full_stop), down(full_stop)) if short_is_full else down(full_stop)
  if segments is not None:
    low, high, full_low, full_high = segments
    joined = (low > 0) & (low < head)  # [low, head) is no range from 0: visit all of [low, stop)
    start, stop = jnp.where(joined, low, jnp.maximum(start, low)), jnp.where(joined, jnp.maximum(stop, head), stop)
    head, stop = jnp.where(low > 0, 0, jnp.minimum(head, high)), jnp.minimum(stop, high)
    full_start, full_stop = jnp.maximum(full_start, full_low), jnp.minimum(full_stop, full_high)
  start = jnp.maximum(start, head)
  stop = jnp.maximum(stop, start)
  full_start = jnp.where(full_start < head, full_start, jnp.maximum(full_start, start))
  return Visits(head, start, stop, full_start, jnp.minimum(full_stop, stop))


def segment_ranges(
  rows: Int[Array, "B R"], columns: Int[Array, "B C"], row_block: int, column_block: int
) -> Int[Array, "B tiles 4"]:
  """For each tile of rows the column blocks [start, stop) that may share a segment with it, and of these
  [full_start, full_stop) where all is one segment. Both arrays are whole blocks long."""
  many = jnp.iinfo(jnp.int32)

  def extremes(ids, block):
    ids = ids.reshape(ids.shape[0], -1, block)
    low = jnp.where(ids == 0, many.max, ids).min(-1)
    high = jnp.where(ids == 0, many.min, ids).max(-1)
    return low, high, (low == high) & (ids != 0).all(-1)

  def bounds(some):
    count = some.shape[-1]
    first = jnp.where(some.any(-1), jnp.argmax(some, -1), 0)
    last = jnp.where(some.any(-1), count - jnp.argmax(some[..., ::-1], -1), 0)
    return first, last

  low, high, one = (x[:, :, None] for x in extremes(rows, row_block))
  column_low, column_high, column_one = (x[:, None, :] for x in extremes(columns, column_block))
  start, stop = bounds((low <= column_high) & (column_low <= high))
  full = one & column_one & (low == column_low)
  full_start, full_stop = bounds(full)
  whole = full_stop - full_start == full.sum(-1)  # a segment that comes back later is not one range
  return jnp.stack([start, stop, full_start, jnp.where(whole, full_stop, full_start)], -1).astype(jnp.int32)


# ---------------------------------------------------------------- what the kernels read


def pad_to(x: Array, axis: int, multiple: int, mode: str = "constant") -> Array:
  """`x` with zeros (mode "edge": copies of its last slice) up to a multiple."""
  extra = -x.shape[axis] % multiple
  widths = [(0, extra if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths, mode=mode) if extra else x


def row_arrays(options: Options) -> dict[str, Array]:
  """The scalars of each row or head that a kernel reads from global memory, by name; only those asked for."""
  arrays = {
    "offset": options.query_offset,
    "prefix": options.prefix_lengths,
    "slope": options.alibi_slopes,
  }
  return {name: x.astype(jnp.float32 if name == "slope" else jnp.int32) for name, x in arrays.items() if x is not None}


def key_arrays(options: Options, block: int) -> Int[Array, "B A S"] | None:
  """What masks need of every key: its segment, its position, in this order, as far as asked for; whole blocks of
  keys, with segment 0 behind the end."""
  arrays = [options.key_segments] if options.query_segments is not None else []
  arrays += [options.key_positions] if options.key_positions is not None else []
  return pad_to(jnp.stack(arrays, 1).astype(jnp.int32), 2, block) if arrays else None


def query_arrays(options: Options, block: int) -> Int[Array, "B T"] | None:
  """The segment of every query, whole blocks of them; behind the end the last one goes on."""
  if options.query_segments is None:
    return None
  return pad_to(options.query_segments.astype(jnp.int32), 1, block, "edge")


def scalars(gmem, row, tile):
  """(place of the row's first query among the keys, its prefix length or None, the tile's segment ranges or None).

  Each role asks for itself: what all know beforehand has to fit the copying warpgroup's few registers.
  """
  offset = gmem["offset"][row] if "offset" in gmem else 0
  prefix = gmem["prefix"][row] if "prefix" in gmem else None
  ranges = tuple(gmem["ranges"][row, tile, i] for i in range(4)) if "ranges" in gmem else None
  return offset, prefix, ranges


def slot_of(step, slots):
  """Where the block of a step lies."""
  return lax.rem(step, jnp.int32(slots))


# ---------------------------------------------------------------- scores


def logits(options: Options, raw: Float[Array, "Q S"], query_place, key_place, slope=None):
  """(values, factor, capped): base-2 logits are values * factor, before masks.

  The factor is a positive Python float, to be folded into the multiply-add in front of exp2; `capped` is
  tanh(scale * raw / softcap), whose derivative the backward pass needs, or None.

  Args:
    raw: query times key.
    query_place, key_place: arrays of raw's shape, read only with slopes; functions without arguments.
    slope: of the head (ALiBi), a scalar.
  """
  values, factor, capped = raw, options.scale * LOG2E, None
  if options.softcap is not None:
    values = capped = jnp.tanh(raw * (options.scale / options.softcap))
    factor = options.softcap * LOG2E
  elif factor <= 0:
    values, factor = raw * factor, 1.0
  if options.alibi_slopes is not None:
    distance = jnp.abs(query_place() - key_place()).astype(jnp.float32)
    values, factor = values * factor - distance * (slope * LOG2E), 1.0
  return values, factor, capped


def mask_row(options: Options, prefix, of_keys, of_queries) -> dict[str, Array]:
  """What `seen` reads.

  Args:
    prefix: the row's prefix length, or None.
    of_keys: i -> the i-th of `key_arrays`, spread over the block.
    of_queries: -> the queries' segments, spread over the block; None without segments.
  """
  found = {} if prefix is None else {"prefix_length": prefix}
  names = ["key_segments"] if of_queries is not None else []
  names += ["key_positions"] if options.key_positions is not None else []
  found |= {name: of_keys(i) for i, name in enumerate(names)}
  return found if of_queries is None else found | {"query_segments": of_queries()}


def along_columns(ref, shape):
  """Shared memory's number for each column, over a block of this shape."""
  return lax.broadcast_in_dim(plgpu.load(ref, layout=COLUMN), shape, [1])


def seen(
  options: Options, query_place, key_place, length: int, block: int, row: dict[str, Array]
) -> Bool[Array, "Q S"]:
  """`visible` for arrays of one shape, which also hides what lies behind the last of `length` keys."""
  mask = visible(options, query_place, key_place, row)
  return mask if length % block == 0 else mask & (key_place < length)

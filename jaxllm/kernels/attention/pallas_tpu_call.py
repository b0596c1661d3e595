"""What flash attention's kernels on TPU share: tiles, operands and their blocks, and the scores of one block."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import tuning
from jaxllm.kernels.attention import pallas_tpu_blocks as blocks
from jaxllm.kernels.attention.options import Options, visible
from jaxllm.kernels.tpu import LANES, VMEM, dot

LARGEST_PART = 512  # queries or keys: where some scores are hidden, parts of this size that nobody sees are left out
DEFAULT_VMEM = 16 << 20  # bytes, what the compiler lends a kernel that asks for nothing
MATRIX_UNIT = {"v6e": 256, "v7": 256}  # columns of a result that come at once; LANES elsewhere
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes of one call, multiples of 128.

  block_q, block_k: queries and keys that one step of the grid holds. chunk: how many of the block that is walked over
  (keys; queries in the kernel of the keys' gradient) have their scores held at once.
  """

  block_q: int
  block_k: int
  chunk: int

  def fitted(self, T: int, S: int) -> "Tiles":
    """No larger than a call of T queries and S keys needs.

    Raises:
      ConfigError: a size that is no multiple of 128.
    """
    if any(size % LANES or size < LANES for size in dataclasses.astuple(self)):
      raise ConfigError(f"attention's tiles on TPU are multiples of {LANES}; these are {self}")

    def fit(block, length):
      part = min(self.chunk, LARGEST_PART)
      unit = LANES if length <= part else part
      return min(block, -(-length // unit) * unit)

    return Tiles(fit(self.block_q, T), fit(self.block_k, S), self.chunk)

  def piece(self, block: int, largest: int) -> int:
    """The size of equal pieces of a block, no larger than chunk and `largest`."""
    return max(n for n in range(LANES, min(self.chunk, largest) + 1, LANES) if block % n == 0)


def default_tiles(target: str | None, H: int, dtype, backward: bool = False) -> tuple[Tiles, int | None]:
  """Tiles, and the bytes of vector memory that a kernel may take (None: the compiler's default).

  Chips with 128 MiB of vector memory (v5e, v6e), with 64 MiB (v5p, v7), and with 16 MiB (v4, or unknown). Chosen by the
  length of the compiler's schedules at T = 4096 and 16384.
  """
  wide = H * jnp.dtype(dtype).itemsize > 256
  vmem = VMEM.get(target or "")
  if vmem is None:
    return Tiles(256 if wide else 512, 512, 256), None
  # Where the matrix unit is done sooner, the vector unit is better off with fewer maxima.
  fewer = not backward and not wide and (target in MATRIX_UNIT or H < LANES)
  return Tiles(512 if wide else 1024, 1024, 1024 if fewer else 512), vmem


@dataclasses.dataclass(frozen=True)
class Call:
  """One kernel's call, before it runs.

  keys_outside: each key block walks over query blocks, not the reverse. standing: scores are [keys, queries], not the
  reverse. turned: sums of scores times tokens are [H, tokens], see `Step.weigh`.
  """

  options: Options
  tiles: Tiles
  B: int
  T: int
  S: int
  K: int
  G: int
  vmem: int | None  # bytes of vector memory it may take; None: the compiler's default
  keys_outside: bool = False
  standing: bool = False
  turned: bool = False

  @classmethod
  def of(cls, query, key, options, target, backward=False) -> "Call":
    """Of a query [B, T, N, H] and a key [B, S, K, H]."""
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    chosen, vmem = default_tiles(target, H, query.dtype, backward)
    name = "attention_backward" if backward else "attention_forward"
    chosen = tuning.tiles(name, target, chosen, head_dim=H, dtype=jnp.dtype(query.dtype).name)
    # The forward kernel would have to turn its factors too: too much for the vector unit beside a larger matrix unit.
    columns = MATRIX_UNIT.get(target or "", LANES)
    turned = columns > H and (backward or columns == LANES)
    return cls(options, chosen.fitted(T, S), B, T, S, K, N // K, vmem, turned=turned)

  @property
  def unit(self) -> float:
    """log2 of a probability that one of `Step.scores` stands for. Where all that awaits a product is a scale, it waits
    for the difference from the maximum: a product that is read twice would be scaled twice, or spilled."""
    o = self.options
    return o.scale * LOG2E if o.scale > 0 and o.softcap is None and o.alibi_slopes is None else 1.0

  @property
  def key_blocks(self) -> int:
    return -(-self.S // self.tiles.block_k)

  def sums(self, rows: int, H: int) -> tuple[int, int]:
    """The shape that holds a sum over scores for each of `rows` tokens."""
    return (H, rows) if self.turned else (rows, H)

  def run(self, kernel, name, operands, results, scratch, products):
    """One pallas_call of `kernel(step, refs, *result refs, *scratch refs)`.

    operands: name -> (array, "query" or "key"); arrays are [B, heads or 1, length, H] or, with one number for each
    token, [B, heads or 1, length]. results: ((shape, dtype), "query", "key" or "end"); what all queries add to is
    written at the end, in one more step for each key block. products: matrix products for a pair.
    """
    o, t = self.options, self.tiles
    query_sums = self.keys_outside or any(side == "end" for _, side in results)
    table, steps = blocks.pairs(o, self.T, self.S, t.block_q, t.block_k, self.keys_outside, query_sums)
    closing = self.key_blocks if any(side == "end" for _, side in results) else 0
    seen = table.size if isinstance(steps, int) else self.T * self.S / (1 + o.visibility.causal) / t.block_q / t.block_k
    table = jnp.concatenate([table, jnp.repeat(table[:, -1:] & ~blocks.FLAGS, closing, 1)], 1)
    length = table.shape[1] if table.shape[0] > 1 else 0  # 0: rows of the batch share the list
    fields = {"offset": o.query_offset, "prefix": o.prefix_lengths, "slopes": o.alibi_slopes, "sinks": o.sinks}
    scalars = {"pairs": table.reshape(-1), **{field: array for field, array in fields.items() if array is not None}}
    if closing:
      scalars["steps"] = jnp.asarray(steps, jnp.int32).reshape(1)
    rows = {
      "query_segments": (o.query_segments, "query"),
      "key_segments": (o.key_segments, "key"),
      "key_positions": (o.key_positions, "key"),
    }
    rows = {field: (array[:, None], side) for field, (array, side) in rows.items() if array is not None}
    operands = operands | rows
    # Numbers of the tokens along the scores' rows come as a row and are turned upright, then kept for every lane.
    tall, block = ("key", t.block_k) if self.standing else ("query", t.block_q)
    upright = {
      field: pltpu.VMEM((block, LANES), array.dtype)
      for field, (array, side) in operands.items()
      if side == tall and array.ndim == 3
    }
    names = [*scalars, *operands]

    def places(*at):  # the group is innermost where gradients of its heads add up block by block
      return (at[0], at[1], at[3], at[2]) if self.keys_outside else at

    def after(g, p, given):
      """The key block to write, once the last pair of the last head is done; negative before that."""
      return jnp.where(g == self.G - 1, p - given["steps"][0], -1)

    def spec(shape, side):
      def index(*at):
        b, k, g, p = places(*at[:4])
        if side == "end":
          block = jnp.maximum(after(g, p, dict(zip(scalars, at[4:]))), 0)
        else:
          block = blocks.place(at[4][b * length + p])[side == "key"]
        head = 0 if shape[1] == 1 else k * self.G + g if side == "query" else k
        return (b, head, 0, block) if len(shape) == 3 else (b, head, block, 0)

      size = t.block_q if side == "query" else t.block_k
      return pl.BlockSpec((None, None, 1, size) if len(shape) == 3 else (None, None, size, shape[3]), index)

    def body(*refs):
      given, rest = dict(zip(names, refs)), refs[len(names) :]
      kept = dict(zip(upright, rest[len(rest) - len(upright) :]))
      b, k, g, p = places(*(pl.program_id(i) for i in range(4)))
      step = Step(self, given, kept, b, k * self.G + g, g, given["pairs"][b * length + p])
      step.after = after(g, p, given) if closing else None

      @pl.when(step.first if self.keys_outside == self.standing else step.masked)
      def turn():
        for field, ref in kept.items():
          ref[...] = jnp.broadcast_to(given[field][...], (LANES, block)).T

      kernel(step, given, *rest[: len(rest) - len(upright)])

    scores = seen * t.block_q * t.block_k * self.B * self.K * self.G
    H = operands["query"][0].shape[3]
    moved = sum(array.size * array.dtype.itemsize for array, _ in operands.values())
    moved += sum(math.prod(shape) * jnp.dtype(dtype).itemsize for (shape, dtype), _ in results)
    cost = pl.CostEstimate(flops=int(2 * products * H * scores), transcendentals=int(scores), bytes_accessed=moved)
    semantics = ("parallel", "parallel", "arbitrary" if query_sums else "parallel", "arbitrary")
    as_rows = lambda shape: (*shape[:2], 1, shape[2]) if len(shape) == 3 else shape  # noqa: E731
    out = pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(scalars),
        grid=(self.B, self.K, *((steps, self.G) if self.keys_outside else (self.G, steps + closing))),
        in_specs=[spec(array.shape, side) for array, side in operands.values()],
        out_specs=[spec(shape, side) for (shape, _), side in results],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch] + list(upright.values()),
      ),
      out_shape=[jax.ShapeDtypeStruct(as_rows(shape), dtype) for (shape, dtype), _ in results],
      compiler_params=pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=self.vmem),
      cost_estimate=cost,
      name=name,
    )(*scalars.values(), *(array.reshape(as_rows(array.shape)) for array, _ in operands.values()))
    return [x.reshape(shape) for x, ((shape, _), _) in zip(out, results)]


class Step:
  """One step of the grid, inside a kernel: a pair of blocks and what is known about it."""

  def __init__(self, call, given, upright, b, head, g, entry):
    self.call, self.given, self.upright, self.head = call, given, upright, head
    i, self.key_block = blocks.place(entry)
    # Places in the arrays.
    self.query_start, self.key_start = i * call.tiles.block_q, self.key_block * call.tiles.block_k
    self.offset = given["offset"][b] if "offset" in given else 0
    self.prefix = given["prefix"][b] if "prefix" in given else None
    self.run, self.masked = (entry & blocks.RUN) != 0, (entry & blocks.MASK) != 0
    self.first, self.last = (entry & blocks.FIRST) != 0, (entry & blocks.LAST) != 0
    self.opens = self.first & (i == 0) & (g == 0)  # nothing came before for this row and key head
    if call.keys_outside:
      self.first, self.last = self.first & (g == 0), self.last & (g == call.G - 1)

  def visit(self, body):
    """body(queries, keys, masked) for parts of this pair of blocks, if somebody needs it.

    Traced twice, so that a pair seen as a whole pays no mask and a part that nobody sees costs nothing.
    """
    call, t = self.call, self.call.tiles

    @pl.when(self.run & ~self.masked)
    def whole():
      walked = t.block_q if call.keys_outside else t.block_k
      size = t.piece(walked, t.chunk)
      for part in (pl.ds(at, size) for at in range(0, walked, size)):
        queries, keys = (part, pl.ds(0, t.block_k)) if call.keys_outside else (pl.ds(0, t.block_q), part)
        body(queries, keys, False)

    @pl.when(self.masked)
    def partly():
      rows, columns = (t.piece(block, LARGEST_PART) for block in (t.block_q, t.block_k))

      @pl.loop(0, t.block_q // rows)
      def some_rows(i):
        @pl.loop(0, t.block_k // columns)
        def some_columns(j):
          queries, keys = (pl.ds(pl.multiple_of(n * size, size), size) for n, size in ((i, rows), (j, columns)))
          row, column = self.query_start + queries.start, self.key_start + keys.start
          q0, low = row + self.offset, 0 if "key_positions" in self.given else column
          ends = q0, q0 + queries.size - 1, column, column + keys.size - 1
          needed = blocks.near(call.options, *ends, low, self.prefix) & (row < call.T) & (column < call.S)
          pl.when(needed)(functools.partial(body, queries, keys, True))

  def scores(self, query, key, queries, keys, masked):
    """(scores in `Call.unit`, their derivative by the capped product, who is seen); [keys, queries] if standing.

    queries, keys: which of their blocks these are. Without a cap the derivative is None; unless masked, so is the last.
    """
    o, standing = self.call.options, self.call.standing
    scores, derivative = dot(key, query, (1, 1)) if standing else dot(query, key, (1, 1)), None
    shape = scores.shape
    if o.softcap is None:
      scores = scores * (o.scale * LOG2E) if self.call.unit == 1 else scores
    else:
      capped = jnp.tanh(scores * (o.scale / o.softcap))
      scores, derivative = capped * (o.softcap * LOG2E), 1 - capped * capped
    query_row = self.query_start + queries.start + iota(shape, int(standing))
    key_row = self.key_start + keys.start + iota(shape, int(not standing))
    query_index = query_row + self.offset
    if o.alibi_slopes is not None:
      slope = LOG2E * self.given["slopes"][self.head].astype(jnp.float32)
      scores = scores - slope * jnp.abs(query_index - key_row).astype(jnp.float32)
    if not masked:
      return scores, derivative, None
    sides = {"query_segments": queries, "key_segments": keys, "key_positions": keys}
    row = {name: self.numbers(name, part, shape) for name, part in sides.items() if name in self.given}
    if self.prefix is not None:
      row["prefix_length"] = self.prefix
    seen = visible(o, query_index, key_row, row)
    if self.call.S % self.call.tiles.block_k:
      seen &= key_row < self.call.S
    if standing and self.call.T % self.call.tiles.block_q:
      seen &= query_row < self.call.T
    return scores, derivative, seen

  def numbers(self, name, part, shape):
    """One number for each token, spread over a block's scores."""
    if name in self.upright:
      return lanes(self.upright[name][part, :], shape[1])
    return jnp.broadcast_to(self.given[name][:, part], shape)

  def weigh(self, scores, tokens, axis):
    """The sum over an axis of scores [rows, columns] times the tokens [that axis, H] along it; shape: `Call.sums`."""
    if self.call.turned:
      return dot(tokens, scores, (0, axis))
    return dot(scores, tokens, (axis, 0))

  def cleared(self, x, side, part, masked):
    """Rows of a block past the end of its array hold anything; zeros instead, so that they may enter a product."""
    call, of_query = self.call, side == "query"
    length, block = (call.T, call.tiles.block_q) if of_query else (call.S, call.tiles.block_k)
    if not masked or length % block == 0:
      return x
    row = (self.query_start if of_query else self.key_start) + part.start + iota(x.shape, 0)
    return jnp.where(row < length, x, 0)


def scaled(x, factor):
  return x if factor == 1 else x * factor


def lanes(x, width):
  """[rows, 128], alike in every lane, as [rows, width]."""
  if width <= LANES:
    return x[:, :width]
  return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def along_lanes(x):
  """[rows, 128], alike in every lane, as [1, rows]: by the diagonal of each square, cheaper than to transpose it."""
  diagonal = iota((LANES, LANES), 0) == iota((LANES, LANES), 1)
  squares = (x[at : at + LANES] for at in range(0, x.shape[0], LANES))
  return jnp.concatenate([jnp.where(diagonal, x, 0).sum(axis=0, keepdims=True) for x in squares], axis=1)


def iota(shape, axis):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

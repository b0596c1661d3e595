"""The head's logits on Hopper, reduced where they are made: a persistent matrix product with a softmax's epilogue.

Every block of 128 tokens x 256 words of the vocabulary stands alone: two warpgroups multiply 64 tokens each (wgmma)
what a third one brings (TMA), then reduce their 64 x 256 logits in registers to the block's largest, its sum of
exponentials and the target's logit, and, when gradients are wanted, store the exponentials in x's dtype. Blocks that
need nothing of each other fill all multiprocessors whatever the number of tokens, and no sum's order depends on timing.
Exponentials are relative to their block's largest logit, which keeps their relative precision in 16 bits (in float16
only down to 6e-5 of the largest). float32 is refused: the tensor core would round it to TF32's 11 bits, where the
backend "xla", which "auto" then takes, multiplies as jax's default precision says.

Not measured on a GPU: checked in the emulator and as machine code. The epilogue (an estimated 4,000 of 70,000 cycles of
a block at D = 4096) is not overlapped with the next block's product, and thread block clusters are not used. XLA makes
the logits' gradient beside the exponentials and not over them, so a chunk holds both.
"""

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxllm.kernels import tuning
from jaxllm.kernels.head_loss import chunks
from jaxllm.kernels.head_loss.chunks import Part, Plan
from jaxllm.kernels.hopper import LOG2E, MULTIPROCESSORS, ROW, ROWS, WGMMA, swizzled

DEPTH = 64  # of x and head in one step of the pipeline: a row of 128 bytes, the widest swizzle
STORE = 32  # columns of one store of exponentials; 64 would leave no room for the fourth stage
NONE = -1e30  # of columns past the vocabulary; finite, because infinity minus infinity is NaN


@dataclasses.dataclass(frozen=True)
class Tiles:
  """What a tuner may change."""

  words: int = 256  # of the vocabulary in a block
  stages: int = 4  # of the pipeline
  group: int = 16  # blocks of tokens that share a pass over the head: their x should stay in the L2 cache
  blocks: int = MULTIPROCESSORS  # that run at once: the chip's multiprocessors
  exponentials: int = 1 << 27  # of a chunk of tokens: 256 MiB, and as much again for the gradient made of them


def refuses(call, x: Array, head: Array) -> str | None:
  """Why this call cannot be computed here, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 and float16 only, not {x.dtype}"
  if not (x.size and head.size):
    return "no tokens or no vocabulary"
  return None


def _plan(call, x, head, keep):
  """Both operands in x's dtype, with rows that TMA can address and a depth of whole steps."""
  options, (M, D), V = call.options, x.shape, call.options.words(head)
  tiles = tuning.tiles("cross_entropy", call.target, Tiles(), D=D)
  deeper = chunks.round_up(D, DEPTH) - D
  # Arrays of which TMA copies swizzled tiles are whole numbers of the swizzle's tiles, [8, 64].
  longer = -head.shape[0] % 8 if options.transposed else -head.shape[1] % DEPTH
  pads = ((0, longer), (0, deeper)) if options.transposed else ((0, deeper), (0, longer))
  rows = chunks.round_up(M, 2 * ROWS)  # all tokens at once, where nothing large is kept
  if keep:
    rows = chunks.chunk_rows(M, V, tiles.exponentials, 2 * ROWS, options.chunk and chunks.round_up(options.chunk, 128))
  part = functools.partial(_part, options, tiles, V)
  return Plan(part, jnp.pad(x, ((0, 0), (0, deeper))), jnp.pad(head.astype(x.dtype), pads), rows)


forward, backward = chunks.by(_plan)


def _part(options, tiles, V, x, w, targets, keep):
  """The blocks of one chunk: statistics [words' blocks, C] and exponentials."""
  C, transposed, N = x.shape[0], options.transposed, tiles.words
  blocks = (C // (2 * ROWS), -(-V // N))
  count = 4 if options.sums else 3
  out = [jax.ShapeDtypeStruct((count, blocks[1], C), jnp.float32)]
  if keep:
    out.append(jax.ShapeDtypeStruct((C, chunks.round_up(V, DEPTH)), x.dtype))
  kernel = plgpu.kernel(
    functools.partial(_kernel, options, tiles, V, keep),
    out_type=out,
    grid=(min(tiles.blocks, math.prod(blocks)),),
    grid_names=("block",),
    num_threads=3,
    thread_name="warpgroup",
    scratch_types=dict(
      x_smem=plgpu.SMEM((tiles.stages, 2 * ROWS, DEPTH), x.dtype, transforms=swizzled(DEPTH)),
      w_smem=plgpu.SMEM(
        (tiles.stages, *((N, DEPTH) if transposed else (DEPTH, N))), x.dtype, transforms=swizzled(DEPTH)
      ),
      e_smem=plgpu.SMEM((2, 2, ROWS, STORE), x.dtype, transforms=swizzled(STORE)) if keep else None,
      stats_smem=plgpu.SMEM((2, count, ROWS), jnp.float32),
      full=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
      empty=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
    ),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name="head_loss",
  )
  stats, *rest = kernel(x, w, targets)
  tops, totals, ats, *sums = jnp.swapaxes(stats, 1, 2)
  return Part(tops, totals, ats, sums[0] if sums else None, rest[0] if keep else None, N)


def _kernel(options, tiles, V, keep, x_gmem, w_gmem, targets_gmem, stats_gmem, *refs, **scratch):
  """One multiprocessor: its share of the blocks, one after another, through one pipeline."""
  e_gmem = refs[0] if keep else None
  x_smem, w_smem, full, empty = (scratch[name] for name in ("x_smem", "w_smem", "full", "empty"))
  transposed, N, S = options.transposed, tiles.words, tiles.stages
  C, D = x_gmem.shape
  tall, wide, steps = C // (2 * ROWS), -(-V // N), D // DEPTH
  total, running = tall * wide, min(tiles.blocks, tall * wide)
  first, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
  mine = lax.div(total - first + running - 1, jnp.int32(running))

  def place(i):
    """Of my i-th block: (among tokens, among words). Neighbours in time share words, then tokens."""
    index = first + i * running
    group = lax.div(index, jnp.int32(tiles.group * wide))
    start = group * tiles.group
    height = jnp.minimum(tiles.group, tall - start)
    index = index - start * wide
    return start + lax.rem(index, height), lax.div(index, height)

  @pl.when(warpgroup == 2)
  def _load():
    plgpu.set_max_registers(40, action="decrease")

    @pl.loop(0, mine)
    def _block(i):
      row, column = place(i)

      @pl.loop(0, steps)
      def _step(k):
        step = i * steps + k
        slot = lax.rem(step, jnp.int32(S))
        pl.when(step >= S)(lambda: plgpu.barrier_wait(empty.at[slot]))
        depth = pl.ds(k * DEPTH, DEPTH)
        words = pl.ds(column * N, N)
        tokens = pl.ds(row * 2 * ROWS, 2 * ROWS)
        plgpu.copy_gmem_to_smem(x_gmem.at[tokens, depth], x_smem.at[slot], full.at[slot])
        part = w_gmem.at[words, depth] if transposed else w_gmem.at[depth, words]
        plgpu.copy_gmem_to_smem(part, w_smem.at[slot], full.at[slot])

  @pl.when(warpgroup < 2)
  def _compute():
    plgpu.set_max_registers(232, action="increase")

    @pl.loop(0, mine)
    def _block(i):
      row, column = place(i)

      def multiply(acc):
        @pl.loop(0, steps)
        def _step(k):
          slot = lax.rem(i * steps + k, jnp.int32(S))
          plgpu.barrier_wait(full.at[slot])
          w = w_smem.at[slot]
          plgpu.wgmma(acc, x_smem.at[slot, pl.ds(warpgroup * ROWS, ROWS)], w.T if transposed else w)
          plgpu.wgmma_wait(1)  # the product before this one has read its operands

          @pl.when(k > 0)
          def _():
            plgpu.barrier_arrive(empty.at[lax.rem(i * steps + k - 1, jnp.int32(S))])

        logits = acc[...]
        plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, jnp.int32(S))])
        return logits

      z = pl.run_scoped(multiply, plgpu.ACC((ROWS, N), jnp.float32))
      tokens = pl.ds(row * 2 * ROWS + warpgroup * ROWS, ROWS)
      stats, e = _reduce(options, V, z, column * N, targets_gmem.at[tokens])
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)
      for n, values in enumerate(stats):
        scratch["stats_smem"][warpgroup, n] = values
      plgpu.commit_smem()
      for n in range(len(stats)):
        plgpu.copy_smem_to_gmem(scratch["stats_smem"].at[warpgroup, n], stats_gmem.at[n, column, tokens])
      if keep:
        for n in range(0, N, STORE):
          buffer = scratch["e_smem"].at[warpgroup, n // STORE % 2]
          if n >= 2 * STORE:
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          buffer[...] = e[:, n : n + STORE].astype(e_gmem.dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(buffer, e_gmem.at[tokens, pl.ds(column * N + n, STORE)])

    plgpu.wait_smem_to_gmem(0)


def _reduce(options, V, z, first, targets):
  """Statistics [ROWS] each and exponentials of a block's logits."""

  def across(values):  # a number for each token
    return lax.broadcast_in_dim(values, z.shape, [0])

  if options.softcap is not None:
    # By an exponential, because the hardware's tanh is good to 11 bits only; the root squared is a quick reciprocal.
    root = lax.rsqrt(1 + jnp.exp2(z * (2 * LOG2E / options.softcap)))
    z = lax.optimization_barrier(options.softcap - 2 * options.softcap * (root * root))
  words = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=WGMMA)  # of this block: constants
  target = plgpu.load(targets, layout=ROW, optimized=False)
  at = jnp.where(words == across(target - first), z, 0.0).sum(1)
  # Words past V are zeros of the copy, so that they count nothing here; a mask as well would cost registers.
  sums = (z.sum(1),) if options.sums else ()
  if V % z.shape[1]:
    z = jnp.where(words < V - first, z, NONE)
  # Barriers keep the compiler from mixing the stages, for which there are not enough registers.
  z, at, *sums = lax.optimization_barrier((z, at, *sums))
  top = z.max(1)
  e = jnp.exp2(z * LOG2E - across(top * LOG2E))
  return (top, e.sum(1), at, *sums), e

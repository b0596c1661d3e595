"""The head's logits on TPU, reduced in vector memory: a matrix product whose epilogue is a softmax's.

A step of the grid multiplies a block of tokens, resident in VMEM, with a block of the vocabulary (MXU), reduces the
logits to their largest, their sum of exponentials and the target's logit, and, when gradients are wanted, writes the
exponentials in x's dtype; a second kernel turns those into the logits' gradient in place. Steps need nothing of each
other, so that chips with two cores share them.

Not measured on a TPU: checked in the emulator and compiled ahead of time.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxllm.kernels import tuning
from jaxllm.kernels.head_loss import chunks
from jaxllm.kernels.head_loss.chunks import Part, Plan
from jaxllm.kernels.tpu import LANES

# MiB of vector memory: what blocks are chosen for, and what the kernel may take.
VMEM, PLENTY = {"v4": (11, 16), "v5p": (56, 64), "v7": (56, 64)}, (100, 114)
NONE = -1e30  # of columns past the vocabulary; finite, because infinity minus infinity is NaN


@dataclasses.dataclass(frozen=True)
class Tiles:
  """What a tuner may change."""

  tokens: int  # of a block
  words: int  # of the vocabulary in a block
  exponentials: int = 1 << 27  # of a chunk of tokens: 256 MiB in 16 bits


def refuses(call, x: Array, head: Array) -> str | None:
  """Why this call cannot be computed here, or None."""
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    return f"bfloat16 and float32 only, not {x.dtype}"
  if _tiles(x.shape[-1], x.dtype, call.target) is None:
    return f"x of {x.shape[-1]} dimensions does not fit the vector memory of {call.target}"
  return None


def _plan(call, x, head, keep):
  """Both operands in x's dtype, their depth a multiple of the lanes."""
  options, target, (M, D), V = call.options, call.target, x.shape, call.options.words(head)
  tiles = _tiles(D, x.dtype, target)
  rows = chunks.chunk_rows(M, 1, M, LANES)  # all tokens at once, where nothing large is kept
  if keep:
    budget = tiles.exponentials * 2 // x.dtype.itemsize
    rows = chunks.chunk_rows(M, V, budget, LANES, options.chunk and chunks.round_up(options.chunk, LANES))
  deeper = (0, -D % LANES)
  wide_head = jnp.pad(head.astype(x.dtype), ((0, 0), deeper) if options.transposed else (deeper, (0, 0)))
  part, finish = functools.partial(_part, options, tiles, target, V), functools.partial(_finish, options, tiles, target)
  return Plan(part, jnp.pad(x, ((0, 0), deeper)), wide_head, rows, finish, pinned=True)


forward, backward = chunks.by(_plan)


def _tiles(D, dtype, target) -> Tiles | None:
  """The largest blocks that fit; more tokens first, because every block of them reads the whole head."""
  size = jnp.dtype(dtype).itemsize
  for tokens in (1024, 512, 256, 128):
    for words in (512, 256, 128):
      operands = 2 * size * chunks.round_up(D, LANES) * (tokens + words)  # two of each, one being fetched
      # logits and two temporaries in float32, two blocks of exponentials being written
      if operands + tokens * words * (12 + 2 * size) <= VMEM.get(target, PLENTY)[0] << 20:
        return tuning.tiles("cross_entropy", target, Tiles(tokens, words), D=D, dtype=jnp.dtype(dtype).name)
  return None


def _blocks(tiles, C, V):
  """(tokens of a block, blocks of tokens, blocks of words)."""
  high = -(-C // tiles.tokens)
  return chunks.round_up(-(-C // high), LANES), high, -(-V // tiles.words)


def _params(target):
  # One dimension of the grid, because cores share the first one and there may be only one block of tokens.
  limit = VMEM.get(target, PLENTY)[1] << 20
  return pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=limit)


def _part(options, tiles, target, V, x, w, targets, keep):
  """The blocks of one chunk."""
  C, D = x.shape
  N = tiles.words
  tokens, high, wide = _blocks(tiles, C, V)
  out = [jax.ShapeDtypeStruct((wide, 8, C), jnp.float32)]
  out_specs = [pl.BlockSpec((1, 8, tokens), lambda n: (lax.rem(n, wide), 0, lax.div(n, wide)))]
  if keep:
    out.append(jax.ShapeDtypeStruct((C, V), x.dtype))
    out_specs.append(pl.BlockSpec((tokens, N), lambda n: (lax.div(n, wide), lax.rem(n, wide))))
  head = (
    pl.BlockSpec((N, D), lambda n: (lax.rem(n, wide), 0))
    if options.transposed
    else pl.BlockSpec((D, N), lambda n: (0, lax.rem(n, wide)))
  )
  stats, *rest = pl.pallas_call(
    functools.partial(_kernel, options, V, N, wide),
    grid=(high * wide,),
    in_specs=[
      pl.BlockSpec((tokens, D), lambda n: (lax.div(n, wide), 0)),
      head,
      pl.BlockSpec((tokens, 1), lambda n: (lax.div(n, wide), 0)),
    ],
    out_specs=out_specs,
    out_shape=out,
    compiler_params=_params(target),
    cost_estimate=pl.CostEstimate(
      flops=2 * C * D * V,
      transcendentals=C * V,
      bytes_accessed=x.dtype.itemsize * (C * D + high * D * V + C * V * keep),
    ),
    name="head_loss",
  )(x, w, targets[:, None])
  tops, totals, ats, sums = (stats[:, n].T for n in range(4))
  return Part(tops, totals, ats, sums if options.sums else None, rest[0] if keep else None, N)


def _kernel(options, V, N, wide, x, w, targets, stats, *exponentials):
  contract = (((1,), (1 if options.transposed else 0,)), ((), ()))
  z = lax.dot_general(x[...], w[...], contract, preferred_element_type=jnp.float32)
  if options.softcap is not None:
    z = options.softcap * jnp.tanh(z / options.softcap)
  words = lax.rem(pl.program_id(0), wide) * N + lax.broadcasted_iota(jnp.int32, z.shape, 1)
  if V % N:
    z = jnp.where(words < V, z, NONE)
  at = jnp.where(words == targets[...], z, 0.0).sum(1, keepdims=True)
  top = z.max(1, keepdims=True)
  e = jnp.exp(z - top)
  columns = [top, e.sum(1, keepdims=True), at]
  if options.sums:
    columns.append((jnp.where(words < V, z, 0.0) if V % N else z).sum(1, keepdims=True))
  # Tokens lie along sublanes here, and along lanes in the result: side by side, then turned.
  lane = lax.broadcasted_iota(jnp.int32, (z.shape[0], LANES), 1)
  together = jnp.zeros(lane.shape, jnp.float32)
  for n, column in enumerate(columns):
    together = jnp.where(lane == n, column, together)
  stats[0] = together.T[:8]
  for ref in exponentials:
    ref[...] = e.astype(ref.dtype)


def _finish(options, tiles, target, part, scale, targets, k):
  """The gradient of a chunk's logits, written over its exponentials."""
  e, N = part.exponentials, tiles.words
  C, V = e.shape
  tokens, high, wide = _blocks(tiles, C, V)
  rows = jnp.stack([scale.T, part.tops.T], axis=1)
  block = pl.BlockSpec((tokens, N), lambda n: (lax.div(n, wide), lax.rem(n, wide)))
  row = pl.BlockSpec((1, 8, tokens), lambda n: (lax.rem(n, wide), 0, lax.div(n, wide)))
  column = pl.BlockSpec((tokens, 1), lambda n: (lax.div(n, wide), 0))
  return pl.pallas_call(
    functools.partial(_finish_kernel, options, N, wide),
    grid=(high * wide,),
    in_specs=[block, row, column, column, column],
    out_specs=block,
    out_shape=jax.ShapeDtypeStruct(e.shape, e.dtype),
    input_output_aliases={0: 0},
    compiler_params=_params(target),
    cost_estimate=pl.CostEstimate(flops=3 * e.size, transcendentals=0, bytes_accessed=2 * e.size * e.dtype.itemsize),
    name="head_loss_gradient",
  )(e, jnp.pad(rows, ((0, 0), (0, 6), (0, 0))), targets[:, None], k.of_target[:, None], k.of_all[:, None])


def _finish_kernel(options, N, wide, e, rows, targets, of_target, of_all, out):
  words = lax.rem(pl.program_id(0), wide) * N + lax.broadcasted_iota(jnp.int32, e.shape, 1)
  columns = rows[0].T  # scale and top of each token
  dz = chunks.logit_gradient(
    options, e[...], columns[:, :1], columns[:, 1:2], words == targets[...], of_target[...], of_all[...]
  )
  out[...] = dz.astype(out.dtype)

"""Statistics and gradients of a head, a chunk of tokens at a time: what the XLA and the Pallas backends share.

A backend computes one chunk's logits and leaves their exponentials; here they become the logits' gradient, which is
multiplied out before the next chunk starts (Liger kernel, Hsu et al. 2024, arXiv 2410.10989). That is three matrix
products, as many as holding all logits takes. Recomputing the logits in the backward pass (Cut Cross-Entropy, Wijmans
et al. 2024, arXiv 2411.09009) would be four or five, and its gain, skipping blocks whose gradient is negligible,
changes the gradient. The price is the sum over chunks of the head's gradient, read and written once per chunk, so
chunks are as large as a bound on chunk * V lets them be; that bound also keeps memory from growing with V.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# The target of a token of which nothing is wanted: a backend may leave it out, its results are not looked at.
UNWANTED = -(2**31)


@dataclasses.dataclass(frozen=True)
class Options:
  """What a call asks for, as `cross_entropy` takes it.

  chunk: None: the backend decides. of_head: whether the head's gradient is wanted, when gradients are.
  """

  softcap: float | None = None
  transposed: bool = False
  chunk: int | None = None
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  of_head: bool = True

  @property
  def sums(self) -> bool:
    """Whether the sum of the logits is needed."""
    return self.label_smoothing > 0

  def words(self, head: Array) -> int:
    """V."""
    return head.shape[0 if self.transposed else 1]


class Statistics(NamedTuple):
  """Of each token's logits, float32."""

  lse: Float[Array, " M"]  # log of the sum of exponentials
  at: Float[Array, " M"]  # the target's
  top: Float[Array, " M"]  # the largest
  sum: Float[Array, " M"]  # zeros unless asked for


class Coefficients(NamedTuple):
  """The gradient of a token's logits is (of_p + of_p_lse * lse) softmax - of_target onehot(target) - of_all."""

  of_p: Float[Array, " M"]
  of_p_lse: Float[Array, " M"]
  of_target: Float[Array, " M"]
  of_all: Float[Array, " M"]


class Part(NamedTuple):
  """A chunk of C tokens as a backend leaves it; the vocabulary in n pieces of `width`, the last one perhaps shorter."""

  tops: Float[Array, "C n"]  # the largest logit of each piece
  totals: Float[Array, "C n"]  # sum of exp(logit - top)
  ats: Float[Array, "C n"]  # the target's logit in its piece, 0 elsewhere
  sums: Float[Array, "C n"] | None  # of logits
  exponentials: Float[Array, "C V"] | None  # exp(logit - the piece's top); columns past V may follow
  width: int


class Plan(NamedTuple):
  """How a backend goes about a call.

  part: (x [C, D], head in x's dtype, targets [C], keep: whether exponentials are needed) -> Part.
  x, head: as it wants them, in x's dtype, perhaps wider.
  rows: tokens at once.
  finish: (Part, scale [C, n] of the exponentials, targets [C], coefficients) -> gradient of the logits [C, V] in x's
    dtype; None: XLA makes it.
  pinned: the head and its gradient go through the loop as [rows / 8, 8, columns], where they can be. XLA for TPU v7
    prefers tiles of 16 rows for products in 16 bits, for which it copies both; eight rows admit no such tile.
  """

  part: Callable[[Array, Array, Array, bool], Part]
  x: Array
  head: Array
  rows: int
  finish: Callable[[Part, Array, Array, Coefficients], Array] | None = None
  pinned: bool = False


def round_up(n: int, multiple: int) -> int:
  """The next multiple."""
  return -(-n // multiple) * multiple


def chunk_rows(M: int, V: int, budget: int, multiple: int, most: int | None = None) -> int:
  """Tokens of a chunk: a multiple of `multiple`, with rows * V up to `budget` elements and little padding of M."""
  limit = max(budget // V // multiple * multiple, multiple)
  if most is not None:
    limit = min(limit, most)
  chunks = -(-M // limit)
  return round_up(-(-M // chunks), multiple)


def by(plan: Callable[..., Plan]) -> tuple[Callable, Callable]:
  """The `forward` and the `backward` of a backend that plans a call so: (call, x, head, keep) -> `Plan`."""
  return functools.partial(_statistics, plan), functools.partial(_gradients, plan)


def _statistics(plan, call, x, head, targets) -> Statistics:
  """Of every token's logits."""
  plan = plan(call, x, head, False)

  def body(carry, piece):
    xc, t = piece
    return carry, _combine(plan.part(xc, plan.head, t, False))

  return _by_rows(body, (), (plan.x, targets), plan.rows)[1]


def _gradients(plan, call, x, head, targets, coefficients) -> tuple[Statistics, Float[Array, "M D"], Array | None]:
  """Statistics and the gradients of x, in x's dtype, and of the head, in float32, where it is asked for.

  The head's gradient is summed over the chunks in float32, for a 16-bit head too: what hundreds of chunks add to a sum
  of 16 bits is mostly rounded away.
  """
  options, plan = call.options, plan(call, x, head, True)
  w, rows, pinned = plan.head, plan.rows, plan.pinned
  finish = plan.finish or functools.partial(_finish, options, options.words(w), x.dtype)
  over_v, over_d = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ()))

  head_shape = w.shape
  pinned = pinned and w.shape[0] % 8 == 0
  shape = (w.shape[0] // 8, 8, w.shape[1]) if pinned else w.shape
  held = w.reshape(shape)

  def body(d_head, piece):
    xc, t, k = piece
    # Without the barrier the reshaping moves out of the loop, and the other tiles come back.
    w = lax.optimization_barrier((held, xc))[0].reshape(head_shape) if pinned else held
    part = plan.part(xc, w, t, True)
    stats = _combine(part)
    scale = jnp.exp(part.tops - stats.lse[:, None]) * (k.of_p + k.of_p_lse * stats.lse)[:, None]
    dz = finish(part, scale, t, k)
    dx = lax.dot_general(dz, w, over_v if options.transposed else over_d, preferred_element_type=jnp.float32)
    if not options.of_head:
      return None, (stats, dx.astype(x.dtype))
    a, b = (dz, xc) if options.transposed else (xc, dz)
    # The dtype of the sum, so that the compiler makes one product that adds in place.
    product = lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    total = product if d_head is None else d_head.reshape(head_shape) + product
    return total.reshape(shape), (stats, dx.astype(x.dtype))

  one = plan.x.shape[0] <= rows
  start = None if one or not options.of_head else jnp.zeros(shape, jnp.float32)
  d_head, (stats, dx) = _by_rows(body, start, (plan.x, targets, coefficients), rows)
  if d_head is not None:
    d_head = d_head.reshape(head_shape)[: head.shape[0], : head.shape[1]]
  return stats, dx[:, : x.shape[1]], d_head


def _by_rows(body, carry, arrays, rows):
  """`lax.scan` of body over chunks of so many rows; rows that pad the last chunk are zeros and are cut off."""
  M = jax.tree.leaves(arrays)[0].shape[0]
  pad = -M % rows

  def split(a):
    a = jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) if pad else a
    return a.reshape(-1, rows, *a.shape[1:])

  arrays = jax.tree.map(split, arrays)
  if rows >= M:
    carry, out = body(carry, jax.tree.map(lambda a: a[0], arrays))
  else:
    carry, out = lax.scan(body, carry, arrays)
    out = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)
  return carry, jax.tree.map(lambda a: a[:M], out)


def _combine(part: Part) -> Statistics:
  top = part.tops.max(-1)
  total = (part.totals * jnp.exp(part.tops - top[:, None])).sum(-1)
  sums = jnp.zeros_like(top) if part.sums is None else part.sums.sum(-1)
  return Statistics(top + jnp.log(total), part.ats.sum(-1), top, sums)


def logit_gradient(options: Options, e: Array, scale, top, is_target, of_target, of_all) -> Float[Array, "C V"]:
  """From exponentials; the other arguments are of one shape with them, or broadcast along the vocabulary."""
  e = e.astype(jnp.float32)
  dz = e * scale - jnp.where(is_target, of_target, 0.0)
  if options.sums:
    dz = dz - of_all
  if options.softcap is not None:
    # The logit is the exponential's logarithm; one so small that it became 0 is taken for the lowest.
    z = jnp.maximum(top + jnp.log(e), -options.softcap)
    dz = dz * (1.0 - (z / options.softcap) ** 2)
  return dz


def _finish(options, V, dtype, part, scale, targets, k) -> Float[Array, "C V"]:
  """One elementwise pass over the exponentials."""

  def wide(a):  # [C, n] -> [C, V]
    return a if a.shape[1] == 1 else jnp.repeat(a, part.width, axis=1)[:, :V]

  is_target = jnp.arange(V) == targets[:, None]
  per_token = k.of_target[:, None], k.of_all[:, None]
  e = part.exponentials[:, :V]
  return logit_gradient(options, e, wide(scale), wide(part.tops), is_target, *per_token).astype(dtype)

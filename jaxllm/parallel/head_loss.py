"""The head's loss on a mesh: every device computes its own tokens with the whole head.

Left to itself the compiler splits neither the loop over chunks of tokens, in which it then puts collectives or all
tokens of the mesh, nor a kernel that it did not write. So the loop always runs by shards:

- tokens are split over every axis of the mesh that divides them, those that split the model too: rows over the axes of
  the batch, positions over the others;
- the head is gathered once, before the loop, in the narrower of its own and x's dtype;
- its gradient is summed in float32, over the chunks and then once over the devices, straight into the shards that the
  head itself lies in.

In the loop a device thus holds the whole head in x's dtype and a float32 gradient of the whole head: for 128256 words
of 4096 numbers in bfloat16, 1.0 and 2.0 GiB.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxllm import kernels
from jaxllm.kernels import CrossEntropy
from jaxllm.parallel.config import AxisRules
from jaxllm.parallel.kernels import Shards, gathered, names, shards

# Logical axes of the head, and of one that is transposed
_HEAD_AXES = {False: ("embed", "vocab"), True: ("vocab", "embed")}


@dataclasses.dataclass(frozen=True)
class _Split:
  """How one call is laid over the mesh, and its options; what is fixed when it is traced."""

  on: Shards | None  # None: one device
  tokens: PartitionSpec  # of [B, T]
  layers: PartitionSpec  # of x as the layers leave it
  head: PartitionSpec
  bias: PartitionSpec
  options: tuple[tuple[str, Any], ...]

  @property
  def axes(self) -> tuple[str, ...]:
    """The mesh axes that split tokens."""
    return sum((names(entry) for entry in self.tokens), ())

  @property
  def hidden(self) -> PartitionSpec:
    return PartitionSpec(*self.tokens, None)

  def run(self, function: Callable, out_specs: Any, *arguments: tuple[Any, Any]) -> Any:
    """`Shards.run`, or the function itself on one device."""
    return (
      function(*(array for array, _ in arguments)) if self.on is None else self.on.run(function, out_specs, *arguments)
    )


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Asked:
  """Of which of its two the matrix's gradient is asked: a frozen head has none, and it is not computed."""

  head: bool
  bias: bool

  def only(self, matrix: tuple[Any, Any]) -> tuple[Any, Any]:
    """(head, bias), or what stands for them, with None for those that are not asked for."""
    return tuple(w if asked else None for w, asked in zip(matrix, (self.head, self.bias)))  # type: ignore[return-value]


def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  bias: Float[Array, " V"] | None = None,
  transposed: bool = False,
  **options: Any,
) -> CrossEntropy:
  """`kernels.cross_entropy`, by shards inside `activation_sharding`; differentiable in x, head and bias.

  Args:
    bias: added to the logits.
    transposed: the head is [V, D], an embedding table.
    options: those of `kernels.cross_entropy`.
  """
  with jax.named_scope("head_loss"):
    split = _split(x, head, transposed, options)
    sums = _cross_entropy(split, _as_in_the_layers(split, x), (head, bias), targets, weights)
    return CrossEntropy(sums[0], *(lax.stop_gradient(total) for total in sums[1:]))


def token_log_probs(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  bias: Float[Array, " V"] | None = None,
  transposed: bool = False,
  **options: Any,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """`kernels.token_log_probs`, by shards inside `activation_sharding`; differentiable in x, head and bias.

  Args:
    mask: tokens to compute, by default all.
    bias: added to the logits.
    transposed: the head is [V, D], an embedding table.
    options: those of `kernels.token_log_probs`.
  """
  with jax.named_scope("head_loss"):
    split = _split(x, head, transposed, options)
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    return _token_log_probs(split, _as_in_the_layers(split, x), (head, bias), targets, mask)


# ---------------------------------------------------------------- the weighted sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(split, x, matrix, targets, weights):
  def local(x, matrix, targets, weights):
    wide = _whole(split, x, matrix)
    return _total(split, kernels.cross_entropy(*wide, targets, weights, **dict(split.options)))

  return split.run(
    local, PartitionSpec(), *_arguments(split, x, matrix), (targets, split.tokens), (weights, split.tokens)
  )


def _forward(split, *primals):
  (x, matrix, targets, weights), asked = _values(primals)

  def local(x, matrix, targets, weights):
    wide, options = _whole(split, x, matrix), dict(split.options)
    sums, dx, d_head = kernels.cross_entropy_gradients(
      *wide, targets, weights, of_head=asked.head or asked.bias, **options
    )
    return _total(split, sums), *_gradients(split, x, asked, dx, d_head)

  out_specs = PartitionSpec(), split.hidden, asked.only((split.head, split.bias))
  arguments = *_arguments(split, x, matrix), (targets, split.tokens), (weights, split.tokens)
  sums, dx, d_matrix = split.run(local, out_specs, *arguments)
  return sums, (dx, d_matrix, jax.tree.map(lambda w: jnp.zeros((), w.dtype), asked.only(matrix)))


def _backward(split, saved, cotangents):
  dx, d_matrix, like = saved
  g = _instantiated(cotangents[0])
  return (dx * g).astype(dx.dtype), _rounded(d_matrix, like, g), None, None


_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


# ---------------------------------------------------------------- token by token


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_log_probs(split, x, matrix, targets, mask):
  def local(x, matrix, targets, mask):
    return kernels.token_log_probs(*_whole(split, x, matrix), targets, mask=mask, **dict(split.options))

  arguments = *_arguments(split, x, matrix), (targets, split.tokens), (mask, split.tokens)
  return split.run(local, (split.tokens, split.tokens), *arguments)


def _forward_tokens(split, *primals):
  arrays, asked = _values(primals)
  if asked.head or asked.bias:
    return _token_log_probs(split, *arrays), (*arrays, asked, None)
  x, matrix, targets, mask = arrays

  def local(x, matrix, targets, mask):
    wide = _whole(split, x, matrix)
    *results, slopes = kernels.token_log_probs_and_slopes(*wide, targets, mask=mask, **dict(split.options))
    return tuple(results), slopes[..., : x.shape[-1]]

  arguments = *_arguments(split, x, matrix), (targets, split.tokens), (mask, split.tokens)
  results, slopes = split.run(local, ((split.tokens, split.tokens), split.hidden), *arguments)
  return results, (*arrays, asked, slopes)


def _backward_tokens(split, saved, cotangents):
  x, matrix, targets, mask, asked, slopes = saved
  if slopes is not None and isinstance(cotangents[1], jax.custom_derivatives.SymbolicZero):
    d_logp = _instantiated(cotangents[0])[..., None]
    return (d_logp * slopes).astype(x.dtype), asked.only(matrix), None, None

  def local(x, matrix, targets, mask, *d):
    wide, options = _whole(split, x, matrix), dict(split.options)
    of_head = asked.head or asked.bias
    dx, d_head = kernels.token_log_probs_gradients(*wide, targets, *d, mask=mask, of_head=of_head, **options)
    return _gradients(split, x, asked, dx, d_head)

  by_token = ((a, split.tokens) for a in (targets, mask, *map(_instantiated, cotangents)))
  out_specs = split.hidden, asked.only((split.head, split.bias))
  dx, d_matrix = split.run(local, out_specs, *_arguments(split, x, matrix), *by_token)
  return dx, _rounded(d_matrix, asked.only(matrix)), None, None


_token_log_probs.defvjp(_forward_tokens, _backward_tokens, symbolic_zeros=True)


def _values(primals):
  """The arrays of what a forward rule with symbolic zeros is given, and which gradients are asked for."""
  head, bias = primals[1]
  return jax.tree.map(lambda p: p.value, primals), _Asked(head.perturbed, bias is not None and bias.perturbed)


def _instantiated(d):
  """A cotangent that is known to be 0 too as an array."""
  return jnp.zeros(d.shape, d.dtype) if isinstance(d, jax.custom_derivatives.SymbolicZero) else d


# ---------------------------------------------------------------- what is split how


def _split(x, head, transposed, options) -> _Split:
  options = (*sorted(options.items()), ("transposed", transposed))
  if (on := shards()) is None:
    nothing = PartitionSpec(None, None)
    return _Split(None, nothing, nothing, nothing, PartitionSpec(None), options)
  axes = _HEAD_AXES[transposed]
  spec = on.spec(head.shape, *axes)
  layers = on.spec(x.shape, "batch", "seq", None)
  tokens = token_spec(x.shape[0], x.shape[1], on.mesh, on.rules)
  bias = PartitionSpec(spec[axes.index("vocab")])
  return _Split(on, tokens, layers, spec, bias, options)


def token_spec(B: int, T: int, mesh: Mesh, rules: AxisRules) -> PartitionSpec:
  """Which mesh axes split B rows of T positions where nothing ties them to one another: all that divide them.

  Rows over the axes of the batch, positions over the others. On an axis that divides neither every device computes the
  same; the log says so.
  """
  rows: tuple[str, ...] = ()
  columns: tuple[str, ...] = ()
  ways = lambda axes: math.prod(mesh.shape[axis] for axis in axes)  # noqa: E731
  for axis in rules.batch:
    if mesh.shape[axis] > 1 and B % (ways(rows) * mesh.shape[axis]) == 0:
      rows += (axis,)
  for axis in dict.fromkeys((*rules.seq, *mesh.axis_names)):
    if mesh.shape[axis] > 1 and axis not in rows and T % (ways(columns) * mesh.shape[axis]) == 0:
      columns += (axis,)
  rest = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in rows + columns)
  if rest:
    _say_repeated(B, T, " x ".join(f"{axis} {mesh.shape[axis]}" for axis in rest))
  return PartitionSpec(rows or None, columns or None)


@functools.cache
def _say_repeated(B, T, axes):
  """Once for each shape."""
  logging.getLogger("jaxllm").warning(
    "head loss: %d rows of %d positions do not divide over the mesh axes %s, whose devices compute the same", B, T, axes
  )


def _as_in_the_layers(split, x):
  """x where the layers leave it, and its gradient where they take it: else the compiler carries the split of positions
  over the model's axes back into the layers."""
  return x if split.on is None else lax.with_sharding_constraint(x, NamedSharding(split.on.mesh, split.layers))


def _arguments(split, x, matrix):
  """The first two of every call, with their specs."""
  return (x, split.hidden), (matrix, (split.head, None if matrix[1] is None else split.bias))


# ---------------------------------------------------------------- on one device


def _with_bias(x, head, bias, transposed):
  """(x, head) with the bias as the head's weights of one more input, which is always 1."""
  if bias is None:
    return x, head
  x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
  axis = _HEAD_AXES[transposed].index("embed")
  return x, jnp.concatenate([head, jnp.expand_dims(bias, axis).astype(head.dtype)], axis=axis)


def _whole(split, x, matrix):
  """(x, head) as the kernels take them, of the shards; weights are gathered in x's dtype where that is narrower."""

  def whole(w, spec):
    narrow = split.on is not None and x.dtype.itemsize < w.dtype.itemsize
    return gathered(w.astype(x.dtype) if narrow else w, spec)

  head, bias = (None if w is None else whole(w, spec) for w, spec in zip(matrix, (split.head, split.bias)))
  return _with_bias(x, head, bias, dict(split.options)["transposed"])


def _total(split, sums):
  """The sums of all devices, in one collective."""
  total = jnp.stack(jax.tree.leaves(sums))
  return tuple(lax.psum(total, split.axes) if split.axes else total)


def _gradients(split, x, asked, dx, d_head):
  """(dx, gradients of the head's and the bias's shards): what the kernel gave, summed over the devices."""
  axis, D = _HEAD_AXES[dict(split.options)["transposed"]].index("embed"), x.shape[-1]
  d_bias = None
  if asked.bias:
    d_bias = _shard_of_sum(lax.index_in_dim(d_head, D, axis, keepdims=False), split.bias, split)
  d_head = _shard_of_sum(lax.slice_in_dim(d_head, 0, D, axis=axis), split.head, split) if asked.head else None
  return dx[..., :D], (d_head, d_bias)


def _shard_of_sum(g, spec, split):
  """This device's shard, by `spec`, of the sum over the devices that have different tokens."""
  for dimension, entry in enumerate(spec):
    for axis in names(entry):
      if axis in split.axes:
        g = lax.psum_scatter(g, axis, scatter_dimension=dimension, tiled=True)
      else:  # its devices have the same tokens
        size = g.shape[dimension] // split.on.mesh.shape[axis]
        g = lax.dynamic_slice_in_dim(g, lax.axis_index(axis) * size, size, dimension)
  rest = tuple(axis for axis in split.axes if not any(axis in names(entry) for entry in spec))
  return lax.psum(g, rest) if rest else g


def _rounded(d_matrix, like, factor=None):
  """Gradients times the factor, in the dtypes of `like`."""

  def one(d, w):
    if w.dtype != d.dtype:
      # Said so that XLA rounds no sooner: to send half the bytes it would sum over the devices in 16 bits. XLA for TPU
      # even fails on the bare conversion, in a loop over micro-batches (libtpu 0.0.48).
      d = lax.reduce_precision(d, jnp.finfo(w.dtype).nexp, jnp.finfo(w.dtype).nmant)
    return (d if factor is None else d * factor).astype(w.dtype)

  return jax.tree.map(one, d_matrix, like)

"""The gradients of flash attention on TPUs: one kernel for the queries', one for the keys' and values'.

Both compute the probabilities again from the log-sum-exp. With p the probability, the gradient of a score is
p * (d_out value^T - delta) (arXiv 2205.14135, section B.4). The second kernel holds a key block and walks over the
query blocks of all heads of its group, with scores standing on end, [keys, queries]: then both sums over queries are
plain products, and numbers of the queries lie along the lanes as they come.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxllm.kernels.attention.options import Options
from jaxllm.kernels.attention.pallas_tpu_call import LOG2E, Call, Tiles, dot


def backward(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  options: Options,
  lse: Float[Array, "B N T"],
  d_out: Float[Array, "B T N H"],
  delta: Float[Array, "B N T"],
  target: str | None,
  *,
  tiles: Tiles | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Gradients of query, key and value. delta: the sum of out * d_out over H, less the gradient of lse."""
  call = Call.of(query, key, options, target, tiles, backward=True)
  query, key, value, d_out = (jnp.swapaxes(x, 1, 2) for x in (query, key, value, d_out.astype(query.dtype)))
  # A query that sees nothing has only hidden scores, and those come to 0 whatever is subtracted.
  lse = jnp.where(lse == -jnp.inf, 0, lse * LOG2E)
  operands = {
    "query": (query, "query"),
    "d_out": (d_out, "query"),
    "lse": (lse, "query"),
    "delta": (delta.astype(jnp.float32), "query"),
    "key": (key, "key"),
    "value": (value, "key"),
  }
  H = query.shape[3]
  (d_query,) = call.run(
    _query_kernel,
    "attention_backward_query",
    operands,
    results=[((query.shape, query.dtype), "query")],
    scratch=[(call.tiles.block_q, H)],
    products=3,
  )
  d_key, d_value = dataclasses.replace(call, keys_outside=True).run(
    _key_kernel,
    "attention_backward_key",
    operands,
    results=[((key.shape, key.dtype), "key"), ((value.shape, value.dtype), "key")],
    scratch=[(call.tiles.block_k, H)] * 2,
    products=4,
  )
  return jnp.swapaxes(d_query, 1, 2), jnp.swapaxes(d_key, 1, 2), jnp.swapaxes(d_value, 1, 2)


def _query_kernel(step, given, d_query_ref, acc_ref):
  tiles = step.call.tiles

  @pl.when(step.first)
  def start():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def visit(masked):
    for at in range(0, tiles.block_k, tiles.chunk):
      keys = pl.ds(at, tiles.chunk)
      key = step.cleared(given["key"][keys, :], "key", at, masked)
      d_weights = dot(given["d_out"][...], given["value"][keys, :], (1, 1))
      _, d_scores = _gradient(step, given["query"][...], key, d_weights, 0, at, masked)
      acc_ref[...] += dot(d_scores.astype(key.dtype), key, (1, 0))

  step.visit(visit)

  @pl.when(step.last)
  def finish():
    d_query_ref[...] = (step.call.options.scale * acc_ref[...]).astype(d_query_ref.dtype)


def _key_kernel(step, given, d_key_ref, d_value_ref, key_acc_ref, value_acc_ref):
  tiles = step.call.tiles

  @pl.when(step.first)
  def start():
    key_acc_ref[...], value_acc_ref[...] = jnp.zeros_like(key_acc_ref), jnp.zeros_like(value_acc_ref)

  def visit(masked):
    for at in range(0, tiles.block_q, tiles.chunk):
      queries = pl.ds(at, tiles.chunk)
      query, d_out = (step.cleared(given[name][queries, :], "query", at, masked) for name in ("query", "d_out"))
      d_weights = dot(given["value"][...], d_out, (1, 1))
      weights, d_scores = _gradient(step, query, given["key"][...], d_weights, at, 0, masked)
      value_acc_ref[...] += dot(weights.astype(d_out.dtype), d_out, (1, 0))
      key_acc_ref[...] += dot(d_scores.astype(query.dtype), query, (1, 0))

  step.visit(visit)

  @pl.when(step.last)
  def finish():
    d_key_ref[...] = (step.call.options.scale * key_acc_ref[...]).astype(d_key_ref.dtype)
    d_value_ref[...] = value_acc_ref[...].astype(d_value_ref.dtype)


def _gradient(step, query, key, d_weights, query_at, key_at, masked):
  """The probabilities, and the gradient of scale * query key^T."""
  scores, derivative, seen = step.scores(query, key, query_at, key_at, masked)
  lse, delta = (step.numbers(name, query_at, query.shape[0], scores.shape) for name in ("lse", "delta"))
  scores = scores - lse
  weights = jnp.exp2(jnp.where(seen, scores, -jnp.inf) if masked else scores)
  d_scores = weights * (d_weights - delta)
  if derivative is not None:
    d_scores = d_scores * derivative
  return weights, jnp.where(seen, d_scores, 0.0) if masked else d_scores  # hidden numbers may be infinite

"""The gradients of flash attention on TPUs: one kernel for all three, two where its sums do not fit.

All compute the probabilities again from the log-sum-exp. With p the probability, the gradient of a score is
p * (d_out value^T - delta) (arXiv 2205.14135, section B.4). That is five matrix products for a pair of blocks. The one
kernel holds a query block and walks over its key blocks, head after head of a group, while the gradients of all keys
and values that the group shares add up in vector memory; they are written after the last pair, a block at a time.
Nothing is added up twice or in an order of chance. Two kernels, each with sums for one block only, pay seven products.

Scores stand on end, [keys, queries], where they are summed over queries: then these sums are plain products, and
numbers of the queries lie along the lanes as they come.
"""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxllm.kernels.attention.options import Options
from jaxllm.kernels.attention.pallas_tpu_call import DEFAULT_VMEM, LOG2E, Call, scaled
from jaxllm.kernels.tpu import LANES, dot


def backward(
  call, query, key, value, options: Options, lse, d_out, delta
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
  """Of query, key and value, as `api` says."""
  call = Call.of(query, key, options, call.target, backward=True)
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
  of_query, of_key = ((query.shape, query.dtype), "query"), (key.shape, key.dtype)
  if in_one(call, query.shape[3]):
    gradients = _in_one(call, operands, of_query, of_key)
  else:
    gradients = _in_two(call, operands, of_query, of_key)
  return tuple(jnp.swapaxes(x, 1, 2) for x in gradients)  # type: ignore[return-value]


def in_one(call: Call, H: int) -> bool:
  """Does one kernel compute all gradients? If float32 sums for every key and value of one head take no more than two
  thirds of the vector memory that the target lends: 32768 keys of H = 128 on v5p and v7, 43690 on v5e and v6e."""
  width = H if call.turned else -(-H // LANES) * LANES
  return 3 * 2 * 4 * width * call.key_blocks * call.tiles.block_k <= 2 * (call.vmem or DEFAULT_VMEM)


def _in_one(call, operands, of_query, of_key):
  H, tiles = of_query[0][0][3], call.tiles
  of_keys = (call.key_blocks, *call.sums(tiles.block_k, H))
  return dataclasses.replace(call, standing=True).run(
    _kernel,
    "attention_backward",
    operands,
    results=[of_query, (of_key, "end"), (of_key, "end")],
    scratch=[call.sums(tiles.block_q, H), of_keys, of_keys],
    products=5,
  )


def _in_two(call, operands, of_query, of_key):
  call = dataclasses.replace(call, turned=False)
  H, tiles = of_query[0][0][3], call.tiles
  (d_query,) = call.run(
    _query_kernel,
    "attention_backward_query",
    operands,
    results=[of_query],
    scratch=[(tiles.block_q, H)],
    products=3,
  )
  d_key, d_value = dataclasses.replace(call, keys_outside=True, standing=True).run(
    _key_kernel,
    "attention_backward_key",
    operands,
    results=[(of_key, "key"), (of_key, "key")],
    scratch=[(tiles.block_k, H)] * 2,
    products=4,
  )
  return d_query, d_key, d_value


def _kernel(step, given, d_query_ref, d_key_ref, d_value_ref, query_acc_ref, key_acc_ref, value_acc_ref):
  call = step.call

  @pl.when(step.opens)
  def clear():
    @pl.loop(0, call.key_blocks)
    def block(j):
      key_acc_ref[j], value_acc_ref[j] = (jnp.zeros(ref.shape[1:], jnp.float32) for ref in (key_acc_ref, value_acc_ref))

  @pl.when(step.first)
  def start():
    query_acc_ref[...] = jnp.zeros_like(query_acc_ref)

  def visit(queries, keys, masked):
    query, d_out = (step.cleared(given[name][queries, :], "query", queries, masked) for name in ("query", "d_out"))
    key = step.cleared(given["key"][keys, :], "key", keys, masked)
    weights, d_scores = _gradient(step, query, key, given["value"][keys, :], d_out, queries, keys, masked)
    weights, d_scores = weights.astype(key.dtype), d_scores.astype(key.dtype)
    rows = lambda part: (slice(None), part) if call.turned else (part, slice(None))  # noqa: E731
    value_acc_ref[step.key_block, *rows(keys)] += step.weigh(weights, d_out, 1)
    key_acc_ref[step.key_block, *rows(keys)] += step.weigh(d_scores, query, 1)
    query_acc_ref[rows(queries)] += step.weigh(d_scores, key, 0)

  step.visit(visit)
  upright = lambda x: x.T if call.turned else x  # noqa: E731

  @pl.when(step.last)
  def finish():
    d_query_ref[...] = upright(call.options.scale * query_acc_ref[...]).astype(d_query_ref.dtype)

  @pl.when(step.after >= 0)
  def end():
    d_key_ref[...] = upright(call.options.scale * key_acc_ref[step.after]).astype(d_key_ref.dtype)
    d_value_ref[...] = upright(value_acc_ref[step.after]).astype(d_value_ref.dtype)


def _query_kernel(step, given, d_query_ref, acc_ref):
  @pl.when(step.first)
  def start():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  def visit(queries, keys, masked):
    key = step.cleared(given["key"][keys, :], "key", keys, masked)
    query, d_out, value = given["query"][queries, :], given["d_out"][queries, :], given["value"][keys, :]
    _, d_scores = _gradient(step, query, key, value, d_out, queries, keys, masked)
    acc_ref[queries, :] += dot(d_scores.astype(key.dtype), key, (1, 0))

  step.visit(visit)

  @pl.when(step.last)
  def finish():
    d_query_ref[...] = (step.call.options.scale * acc_ref[...]).astype(d_query_ref.dtype)


def _key_kernel(step, given, d_key_ref, d_value_ref, key_acc_ref, value_acc_ref):
  @pl.when(step.first)
  def start():
    key_acc_ref[...], value_acc_ref[...] = jnp.zeros_like(key_acc_ref), jnp.zeros_like(value_acc_ref)

  def visit(queries, keys, masked):
    query, d_out = (step.cleared(given[name][queries, :], "query", queries, masked) for name in ("query", "d_out"))
    key, value = given["key"][keys, :], given["value"][keys, :]
    weights, d_scores = _gradient(step, query, key, value, d_out, queries, keys, masked)
    value_acc_ref[keys, :] += dot(weights.astype(d_out.dtype), d_out, (1, 0))
    key_acc_ref[keys, :] += dot(d_scores.astype(query.dtype), query, (1, 0))

  step.visit(visit)

  @pl.when(step.last)
  def finish():
    d_key_ref[...] = (step.call.options.scale * key_acc_ref[...]).astype(d_key_ref.dtype)
    d_value_ref[...] = value_acc_ref[...].astype(d_value_ref.dtype)


def _gradient(step, query, key, value, d_out, queries, keys, masked):
  """The probabilities, and the gradient of scale * query key^T."""
  scores, derivative, seen = step.scores(query, key, queries, keys, masked)
  # After the scores, whose exponentials the chip computes in the meantime.
  d_weights = dot(value, d_out, (1, 1)) if step.call.standing else dot(d_out, value, (1, 1))
  lse, delta = (step.numbers(name, queries, scores.shape) for name in ("lse", "delta"))
  scores = scaled(scores, step.call.unit) - lse
  weights = jnp.exp2(jnp.where(seen, scores, -jnp.inf) if masked else scores)
  d_scores = weights * (d_weights - delta)
  if derivative is not None:
    d_scores = d_scores * derivative
  return weights, jnp.where(seen, d_scores, 0.0) if masked else d_scores  # hidden numbers may be infinite

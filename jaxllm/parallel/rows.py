"""The gradient of a lookup on a mesh: the sum of the vectors that stand at the same id.

The compiler would add every device's tokens into a table of its own, of all dimensions, and then add up the tables.
Here the devices that share a table's columns first exchange their tokens' vectors, so that each adds up its own
columns of all these tokens; only devices that hold the same columns add up tables.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.parallel.sharding import activation_context, constrain, partition_spec


def add_rows(
  vectors: Float[Array, "B T D"], ids: Int[Array, "B T"], count: int, axis: str | None, columns: str | None = "embed"
) -> Float[Array, "count D"]:
  """A table whose row i is the float32 sum of the vectors with id i; ids outside the table are left out.

  Args:
    axis: the logical axis of the table's rows. columns: that of its columns.
  """

  def total(vectors, ids, first, count):
    ids = jnp.where(ids < first, count, ids - first)  # none is negative, which would count from the end
    return jnp.zeros((count, vectors.shape[-1]), jnp.float32).at[ids].add(vectors.astype(jnp.float32), mode="drop")

  context = activation_context()
  if context is None:
    return total(vectors, ids, 0, count)
  mesh, rules = context
  ways = lambda axes: math.prod(mesh.shape[a] for a in axes)  # noqa: E731
  of_tokens, exchanged = (*rules.batch, *rules.seq), getattr(rules, columns) if columns else ()
  of_rows = getattr(rules, axis) if axis else ()
  divides = not (ids.shape[0] % ways(rules.batch) or ids.shape[1] % ways(rules.seq))
  if not divides or not set(exchanged) <= set(of_tokens) or set(of_rows) & set(of_tokens):
    return constrain(total(vectors, ids, 0, count), axis, None)
  summed = tuple(a for a in of_tokens if a not in exchanged)

  def local(vectors, ids):
    if exchanged:
      vectors = lax.all_to_all(vectors, exchanged, split_axis=2, concat_axis=0, tiled=True)
      ids = lax.all_gather(ids, exchanged, tiled=True)
    own = count // ways(of_rows)
    first = lax.axis_index(of_rows) * own if of_rows else 0
    table = total(vectors, ids, first, own)
    return lax.psum(table, summed) if summed else table

  tokens = partition_spec(("batch", "seq"), rules)
  run = jax.shard_map(
    local, mesh=mesh, in_specs=(PartitionSpec(*tokens, None), tokens), out_specs=partition_spec((axis, columns), rules)
  )
  return run(vectors, ids)

"""Attention on a mesh: every device computes its own rows, heads and queries.

The compiler cannot split a kernel that it did not write, and would gather its operands on every device instead.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import flash_attention
from jaxllm.kernels.backends import TARGETS
from jaxllm.parallel.sharding import activation_context, partition_spec

# Logical axes of flash_attention's array arguments
_AXES = {
  "query_offset": ("batch",),
  "segment_ids": (("batch", "seq"), ("batch", None)),
  "key_positions": ("batch", None),
  "prefix_lengths": ("batch",),
  "sinks": ("heads",),
  "alibi_slopes": ("heads",),
  "bias": (None, "heads", "seq", None),
}


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  *,
  target: str,
  query_offset: Int[Array, " B"] | None = None,
  **options,
) -> Float[Array, "B T N H"]:
  """`flash_attention`, by shards inside `activation_sharding` on accelerators, else as it stands.

  Queries are split over the mesh's `context` axis; every device of it holds all keys and values of its rows.
  """
  context = activation_context()
  if context is None or TARGETS.get(target) == "cpu":
    return flash_attention(query, key, value, target=target, query_offset=query_offset, **options)  # type: ignore[return-value]
  mesh, rules = context
  ways = lambda axes: math.prod(mesh.shape[axis] for axis in axes)  # noqa: E731
  whole_rows = query.shape[0] % ways(rules.batch) != 0  # fewer rows than devices: each computes all
  split_queries = ways(rules.seq) > 1
  arrays = {name: options.pop(name) for name in _AXES if options.get(name) is not None}
  if split_queries and query_offset is None:
    query_offset = jnp.zeros(query.shape[0], jnp.int32)
  if query_offset is not None:
    arrays["query_offset"] = query_offset

  def spec(*axes):
    return partition_spec(tuple(None if a == "batch" and whole_rows else a for a in axes), rules, "attention")

  N, K = query.shape[2], key.shape[2]
  few = ways(rules.heads) > 1 and not rules.kv_heads  # key heads are whole on every device: each takes its own
  if few and ways(rules.heads) % K and K % ways(rules.heads):
    raise ConfigError(f"{K} key heads, kept whole, do not go with query heads in {ways(rules.heads)} parts")

  def local(query, key, value, arrays):
    if few:
      first = jax.lax.axis_index(rules.heads) * query.shape[2] // (N // K)
      count = max(1, K // ways(rules.heads))
      key, value = (jax.lax.dynamic_slice_in_dim(x, first, count, axis=2) for x in (key, value))
    if split_queries:
      start = jax.lax.axis_index(rules.seq) * query.shape[1]
      arrays = arrays | {"query_offset": arrays["query_offset"] + start}
    return flash_attention(query, key, value, target=target, **arrays, **options)

  specs = {n: tuple(spec(*a) for a in _AXES[n]) if n == "segment_ids" else spec(*_AXES[n]) for n in arrays}
  if "bias" in arrays and arrays["bias"].shape[0] > 1:
    specs["bias"] = spec("batch", *_AXES["bias"][1:])
  queries, keys = spec("batch", "seq", "heads", None), spec("batch", None, "kv_heads", None)
  run = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)  # kernels do not say what varies
  return run(local, in_specs=(queries, keys, keys, specs), out_specs=queries)(query, key, value, arrays)

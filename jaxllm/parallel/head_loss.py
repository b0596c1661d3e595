"""The head's loss on a mesh: every device takes its own tokens, with the whole head."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from jaxllm import kernels
from jaxllm.kernels.backends import TARGETS
from jaxllm.parallel.sharding import activation_context, partition_spec


def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  backend: str,
  target: str,
  **options,
) -> kernels.CrossEntropy:
  """`kernels.cross_entropy`; a Pallas kernel, which the compiler cannot split, by shards of the tokens.

  XLA's form it splits itself, over the vocabulary too.
  """
  context = activation_context()
  if context is None or TARGETS.get(target) == "cpu" or backend in ("auto", "xla"):
    return kernels.cross_entropy(x, head, targets, weights, backend=backend, target=target, **options)
  mesh, rules = context
  axes = (*rules.batch, *rules.seq)

  def local(x, head, targets, weights):
    sums = kernels.cross_entropy(x, head, targets, weights, backend=backend, target=target, **options)
    return tuple(jax.lax.psum(getattr(sums, field.name), axes) for field in dataclasses.fields(sums))

  tokens = partition_spec(("batch", "seq"), rules)
  rows, whole = partition_spec(("batch", "seq", None), rules), jax.sharding.PartitionSpec()
  run = jax.shard_map(local, mesh=mesh, in_specs=(rows, whole, tokens, tokens), out_specs=(whole,) * 4, check_vma=False)
  return kernels.CrossEntropy(*run(x, head, targets, weights))

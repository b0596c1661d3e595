"""The head's loss on a mesh: every device computes its own tokens with the whole head.

The compiler cannot split a kernel that it did not write, and would gather all tokens on every device instead.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.kernels import CrossEntropy
from jaxllm.kernels import cross_entropy as on_one_device
from jaxllm.kernels.backends import TARGETS
from jaxllm.parallel.sharding import activation_context


def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  backend: str,
  target: str,
  **options,
) -> CrossEntropy:
  """`kernels.cross_entropy`, by shards inside `activation_sharding` on accelerators, else as it stands.

  Tokens are split over all axes of the mesh that divide them, those that split the model too: rows over the axes of
  the batch, positions over the others. XLA's form, which "auto" takes first, the compiler splits itself.
  """
  loss = functools.partial(on_one_device, backend=backend, target=target, **options)
  context = activation_context()
  if context is None or TARGETS.get(target) == "cpu" or backend in ("auto", "xla"):
    return loss(x, head, targets, weights)
  mesh, rules = context
  B, T = targets.shape
  rows = tuple(rules.batch) if B % math.prod(mesh.shape[axis] for axis in rules.batch) == 0 else ()
  columns: tuple[str, ...] = ()
  for axis in (*rules.seq, *(a for a in mesh.axis_names if a not in rules.seq)):
    if axis not in rows and T % (mesh.shape[axis] * math.prod(mesh.shape[a] for a in columns)) == 0:
      columns += (axis,)
  tokens = PartitionSpec(rows or None, columns or None)

  def local(x, head, targets, weights):
    return jax.tree.map(lambda total: total[None], loss(x, head, targets, weights))

  # Kernels do not say what varies, so nothing can check it.
  run = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
  specs = (PartitionSpec(*tokens, None), PartitionSpec(), tokens, tokens)
  parts = run(local, in_specs=specs, out_specs=PartitionSpec(rows + columns or None))(x, head, targets, weights)
  return jax.tree.map(jnp.sum, parts)

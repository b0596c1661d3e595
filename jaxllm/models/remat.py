"""Which activations of a layer are kept for the backward pass, and which are computed again."""

from collections.abc import Callable

import jax

from jaxllm.models.config import Compute

# The names that layers give to their activations, for `remat="names"`.
NAMES = ("query", "key", "value", "attention", "mlp_up", "mlp_gate")


def remat(layer: Callable, compute: Compute) -> Callable:
  """`layer` under the policy `compute.remat`.

  none: everything is kept. full: only the layer's input. dots: results of weight matmuls. offload: the
  same, in the host's memory. names: the activations listed in `compute.remat_names`.
  """
  policies = jax.checkpoint_policies
  if compute.remat == "none":
    return layer
  if compute.remat == "full":
    policy = policies.nothing_saveable
  elif compute.remat == "dots":
    policy = policies.dots_with_no_batch_dims_saveable
  elif compute.remat == "offload":
    policy = policies.offload_dot_with_no_batch_dims("device", "pinned_host")
  else:
    policy = policies.save_only_these_names(*compute.remat_names)
  return jax.checkpoint(layer, prevent_cse=False, policy=policy)

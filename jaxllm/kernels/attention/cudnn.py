"""cuDNN's fused attention, through jax."""

import jax
from jaxtyping import Array, Float

from jaxllm.kernels.attention.options import Options


def attention(
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  options: Options,
) -> tuple[Float[Array, "B T N H"], None]:
  """Plain attention in 16 bits, without log-sum-exp; segments go in as a mask array of [B, 1, T, S] bits."""
  mask = None
  if options.query_segments is not None:
    queries, keys = options.query_segments[:, None, :, None], options.key_segments[:, None, None, :]
    mask = (queries == keys) & (keys != 0)
  window = None
  if options.visibility.window is not None:
    width = options.visibility.window - 1
    window = (width, 0 if options.visibility.causal else width)
  out = jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=options.scale,
    is_causal=options.visibility.causal,
    local_window_size=window,
    implementation="cudnn",
  )
  return out, None

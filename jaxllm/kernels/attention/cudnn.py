"""cuDNN's fused attention, through jax.

Causal order and a causal window are its own. What else hides keys (segments, a window on both sides) goes in as a mask
of [B, 1, T, S] in 16 bits, which the kernel reads for each head. The mask is quadratic in the length, but has no heads:
at 32 heads and T = 8192 it is 128 MiB a row, where one block of scores of the "xla" form is 512.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels.attention import reference
from jaxllm.kernels.attention.options import Options, unfused
from jaxllm.kernels.backends import TARGETS

MASK_BYTES = 2**30  # of a larger mask "auto" passes this backend over: the square is what fills the memory


def refuses(call, query, key, value, options: Options) -> str | None:
  """Why cuDNN cannot compute the call, or None; by shapes and dtypes only."""
  if unable := options.asked - {"causal", "window", "segment_ids"}:
    return f"no {', '.join(sorted(unable))}"
  if reason := unfused(key, value, options):
    return reason
  T, H = query.shape[1], query.shape[3]
  if key.shape[1] != T:
    return "queries and keys of one length only"
  if query.dtype not in (jnp.bfloat16, jnp.float16) or key.dtype != query.dtype:
    return f"bfloat16 or float16 throughout, not {query.dtype} and {key.dtype}"
  sizes = range(8, 257 if TARGETS.get(call.target) == "hopper" else 129, 8)
  if H not in sizes:
    return f"head dims up to {sizes[-1]} and multiples of 8, not {H}"
  if _masked(options) and T % 2:
    return f"a mask of even lengths only, not {T}"
  return None


def quadratic(call, query, key, value, options: Options) -> str | None:
  """That the mask is too large to be taken unasked, or None."""
  # An older jax has cuDNN make a gradient of the mask too, which has heads.
  shape = (
    query.shape[0],
    *(query.shape[2:3] if jax.__version_info__ < (0, 11, 2) else ()),
    query.shape[1],
    key.shape[1],
  )
  if _masked(options) and 2 * math.prod(shape) > MASK_BYTES:
    return f"its mask of {' x '.join(map(str, shape))} takes {2 * math.prod(shape) / 2**30:.3g} GiB"
  return None


def forward(call, query, key, value, options: Options) -> tuple[Float[Array, "B T N H"], None]:
  """Plain attention in 16 bits, without log-sum-exp."""
  causal, window = options.visibility.causal, options.visibility.window

  def attend(query, key, value, options):
    mask = None
    if _masked(options):
      T = query.shape[1]
      mask = reference.visible_keys(options, jnp.zeros(1, jnp.int32), T, T, options.query_segments)[:, None]
    out = jax.nn.dot_product_attention(
      query,
      key,
      value,
      mask=mask,
      scale=options.scale,
      is_causal=causal,
      local_window_size=(window - 1, 0) if window is not None and causal else None,
      implementation="cudnn",
    )
    # Where no key is visible cuDNN gives the mean of all values.
    return out if mask is None else jnp.where(mask.any(-1)[:, 0, :, None, None], out, 0)

  return (keep_results(attend) if _masked(options) else attend)(query, key, value, options), None


def keep_results(attend):
  """Of a function that calls cuDNN the backward pass keeps the inputs and cuDNN's results, and makes the rest again.

  Otherwise each layer would keep its mask.
  """
  return jax.checkpoint(
    attend, policy=lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd")
  )


def _masked(options: Options) -> bool:
  both_sides = options.visibility.window is not None and not options.visibility.causal
  return options.query_segments is not None or both_sides

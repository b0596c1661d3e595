"""Who else computes the same: jax's own kernels, tokamax, MaxText's settings. Each is a function of a case's inputs.

`KERNELS` names, by family of chips, those that bring a kernel of their own, which can be compiled and read without the
chip. What is not installed, or not for a shape, says so when it is traced.
"""

import functools

import jax
import jax.numpy as jnp

from kernel_cases.case import installed

KERNELS = {
  "hopper": ("tokamax mosaic_gpu", "jax FA3", "jax ragged_dot_mgpu", "jax mixed-type matmul"),
  "tpu": (
    "jax splash",
    "jax splash fused",
    "MaxText splash",
    "tokamax mosaic_tpu",
    "jax megablox",
    "jax ragged paged",
  ),
}
# splash attention's blocks: (queries forward, queries of dkv, queries of dq, keys), fused backward. The first is what
# MaxText sets when nothing is configured (sa_block_* of its base.yml), the last what its benchmarks set for dense
# models (benchmarks/maxtext_trillium_model_configs.py).
SPLASH = {
  "jax splash": (512, 512, 512, 512, False),
  "jax splash fused": (512, 512, 512, 512, True),
  "MaxText splash": (1024, 2048, 2048, 512, False),
}


def attention(N, T, H, dtype, causal, backward, *, window=None, softcap=None, segments=0) -> dict:
  """Functions of (q, k, v) and, with segments, of these as `segments`."""
  found = {}
  if not softcap and not segments:
    span = None if window is None else (window - 1, 0 if causal else window - 1)
    for name in ("cudnn", "xla"):
      found[f"jax.nn {name}"] = functools.partial(
        jax.nn.dot_product_attention, is_causal=causal, implementation=name, local_window_size=span
      )
    if (
      window is None and dtype == jnp.float16 and not (causal and backward)
    ):  # its buffers are float16 whatever goes in
      found["jax FA3"] = functools.partial(_fa3, causal)
  if not segments and installed("tokamax"):
    for name in ("mosaic_gpu", "mosaic_tpu"):
      found[f"tokamax {name}"] = functools.partial(_tokamax_attention, name, causal, window, softcap)
  for name, blocks in SPLASH.items():
    if backward or not blocks[-1]:
      found[name] = functools.partial(_splash, blocks, N, T, H, causal, window, softcap)
  return found


def _fa3(causal, q, k, v):
  """The example kernel that follows FlashAttention-3; it leaves the scale to its caller."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  blocks = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
  config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal, **blocks)
  return attention_mgpu.attention(q * q.shape[-1] ** -0.5, k, v, config)


def _tokamax_attention(implementation, causal, window, softcap, q, k, v):
  import tokamax

  span = None if window is None else (window - 1, 0 if causal else window - 1)
  return tokamax.dot_product_attention(
    *(q, k, v), is_causal=causal, local_window_size=span, logits_soft_cap=softcap, implementation=implementation
  )


def _splash(blocks, N, T, H, causal, window, softcap, q, k, v, segments=None):
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  mask = splash_attention_mask.CausalMask((T, T)) if causal else splash_attention_mask.FullMask((T, T))
  if window:
    mask = splash_attention_mask.LocalMask((T, T), (window - 1, 0 if causal else window - 1), 0)
  *queries, keys, fused = (size if isinstance(size, bool) else min(size, T) for size in blocks)
  sizes = dict(zip(("block_q", "block_q_dkv", "block_q_dq"), queries))
  sizes |= dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute"), keys)
  sizes |= {"block_q_dq": None, "block_kv_dq": None} if fused else {"block_kv_dq": keys}
  K = k.shape[2]
  kernel = splash_attention_kernel.make_splash_mqa_single_device(
    splash_attention_mask.MultiHeadMask([mask] * (N // K)),
    block_sizes=splash_attention_kernel.BlockSizes(**sizes, use_fused_bwd_kernel=fused),
    attn_logits_soft_cap=softcap,
  )
  q = (q * H**-0.5).reshape(*q.shape[:2], K, N // K, H).transpose(0, 2, 3, 1, 4)
  k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
  ids = None if segments is None else splash_attention_kernel.SegmentIds(segments, segments)
  of_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
  out = jax.vmap(of_heads, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)  # [B, K, G, T, H]
  return out.transpose(0, 3, 1, 2, 4).reshape(out.shape[0], T, N, H)


def cross_entropy() -> dict:
  """Functions of (x [1, M, D], head [D, V], targets [1, M]): the sum of the losses."""

  def whole(x, head, targets):
    logits = jnp.einsum("BTD,DV->BTV", x, head, preferred_element_type=jnp.float32)
    at = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - at).sum()

  def by_tokamax(implementation, x, head, targets):
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(
      x[0], targets[0], head, reduction="sum", implementation=implementation
    )

  names = ("chunked_xla", "mosaic_tpu") if installed("tokamax") else ()
  return {"all logits": whole} | {f"tokamax {name}": functools.partial(by_tokamax, name) for name in names}


def mixed_matmul(x, weight, _):
  """jax's example product of int8 and bfloat16, which knows no scales and reads the weight's rows as ours does."""
  from jax.experimental.pallas.ops.gpu import hopper_mixed_type_matmul_mgpu as mixed

  M = x.shape[0]
  if M % 64:
    raise NotImplementedError(f"tiles of 64 tokens, not {M} tokens")
  config = mixed.TuningConfig(tile_m=128, tile_n=64 if M < 128 else 128, tile_k=64, max_concurrent_steps=4)
  product = mixed.mixed_matmul_kernel(weight.values, x.T, out_dtype=x.dtype, config=config)
  return (product * weight.scales[0][:, None].astype(x.dtype)).T


def paged_attention(*, window=None, softcap=None) -> dict:
  """Functions of (q, pages, table, arrays with "kv_lengths" and "query_starts")."""

  def ragged(q, pages, table, arrays):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    P, K, size, H = pages.keys.shape
    combined = jnp.stack([pages.keys, pages.values], 2).transpose(0, 3, 1, 2, 4).reshape(P, size, 2 * K, H)
    B = table.shape[0]
    starts = arrays.get("query_starts", jnp.arange(B + 1, dtype=jnp.int32))
    return ragged_paged_attention(
      *(q, combined, arrays["kv_lengths"], table, starts, jnp.array([B], jnp.int32)),
      sm_scale=H**-0.5,
      sliding_window=window,
      soft_cap=softcap,
      num_kv_pages_per_block=max(1, 1024 // size),  # its table of tuned sizes has no such shapes, and asks for too much
      num_queries_per_block=32,
      vmem_limit_bytes=64 << 20,
    )

  return {"jax ragged paged": ragged}


def grouped_matmul(of, dtype, gradient) -> dict:
  """Functions of (x, weights, dy, group sizes). of: makes one of them from a product that can be differentiated."""

  def megablox(x, w, sizes):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    return gmm(x, w, sizes, preferred_element_type=dtype, tiling=tuple(min(512, n) for n in (*x.shape, w.shape[2])))

  def mgpu(x, w, dy, sizes):
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    tiles = dict(block_m=128, block_n=128, block_k=64, max_concurrent_steps=4, grid_block_n=2)
    if gradient == "weights":
      return transposed_ragged_dot_mgpu.transposed_ragged_dot(x, dy, group_sizes=sizes, **tiles)
    return ragged_dot_mgpu.ragged_dot(
      dy if gradient else x,
      w,
      group_sizes=sizes,
      transpose_rhs=bool(gradient),
      load_group_sizes_to_register=False,
      **tiles,
    )

  def by_tokamax(implementation, x, w, sizes):
    import tokamax

    return tokamax.ragged_dot(x, w, sizes, preferred_element_type=dtype, implementation=implementation)

  found = {"jax ragged_dot": of(jax.lax.ragged_dot), "jax megablox": of(megablox), "jax ragged_dot_mgpu": mgpu}
  for name in ("mosaic_gpu", "mosaic_tpu") if installed("tokamax") else ():
    found[f"tokamax {name}"] = of(functools.partial(by_tokamax, name))
  return found

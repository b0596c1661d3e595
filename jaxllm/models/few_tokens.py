"""A few tokens through all layers in one call, where the model is a Llama and a CPU computes it."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_layers
from jaxllm.kernels.paged import schedule
from jaxllm.models.attention import Placement
from jaxllm.models.caches import Cache, KVCache
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.stores import Paged
from jaxllm.models.weights import Weight, dense
from jaxllm.parallel.sharding import activation_context

MATRICES = (*(("attention", name) for name in ("query", "key", "value", "output")),)
MATRICES += (*(("mlp", name) for name in ("gate", "up", "down")),)


def _is_llama(c: ModelConfig) -> bool:
  """Whether every layer is RMSNorm, rotated heads without biases, RMSNorm, SwiGLU."""
  plain = c.architecture == "decoder" and c.mla is None and c.moe is None and c.adapter is None
  norms = c.norm == "rmsnorm" and c.norm_placement == "pre" and not c.parallel_residual and c.first_norm
  attention = not (c.attention_bias or c.attention_out_bias or c.attention_sinks or c.sink_tokens)
  attention &= c.qk_norm == "none" and c.attention_softcap is None and c.layer_kinds == ("global",)
  return plain and norms and attention and c.mlp == "swiglu" and not c.mlp_bias and _rotates(c)


def _rotates(c: ModelConfig) -> bool:
  return c.position == "rope" and c.rotary_dim == c.head_dim


def _own_kernels(compute: Compute) -> bool:
  """Whether the C++ kernels compute everything, in any order of sums."""
  ops = (compute.matmul, compute.elementwise, compute.attention, compute.quantized_matmul)
  return compute.target == "cpu" and set(ops) <= {"auto", "cpu"}


def run(
  c: ModelConfig,
  compute: Compute,
  x: Float[Array, "B T D"],
  place: Placement,
  cache: Cache,
  weights: Callable[[int], Any],
) -> tuple[Float[Array, "B T D"], KVCache] | None:
  """x after all layers and the cache with its tokens; None where the layers go one after the other.

  Args:
    weights: of a layer, by its number.
  """
  if not (_is_llama(c) and _own_kernels(compute) and isinstance(cache, KVCache) and activation_context() is None):
    return None
  (B, T), stores = x.shape[:2], cache.layers
  packed = B == 1 and cache.count is not None
  paged = all(isinstance(store, Paged) and store.rank is None for store in stores)
  if not paged or B * T > cpu_layers.TOKENS or not (packed or T == 1 and len(cache.length) == B):
    return None
  layers = []
  for i, store in enumerate(stores):
    own = weights(i)
    matrices = tuple(own[part][name]["weight"] for part, name in MATRICES)
    if any(isinstance(w, Weight) for w in matrices):
      return None
    norms = [dense(own[name]["scale"], jnp.float32) for name in ("attention_norm", "mlp_norm")]
    norms = [scale + 1 for scale in norms] if c.norm_unit_offset else norms
    layers.append(cpu_layers.Layer(norms[0], norms[1], matrices, store.pages))
  dtype = jnp.dtype(compute.dtype)
  if cpu_layers.refuses(B * T, layers, dtype) is not None:
    return None
  count = jnp.ones_like(cache.length) if cache.count is None else cache.count
  starts = None if T == 1 and len(count) == B else jnp.concatenate([jnp.zeros(1, count.dtype), jnp.cumsum(count)])
  lengths = jnp.where(count > 0, cache.length + count, 0)
  where = schedule.tokens(B * T, lengths, starts, None)
  y, pages = cpu_layers.run(
    x.reshape(B * T, -1),
    tuple(table.reshape(B * T, -1) for table in place.rope["global"]),
    cache.tables[stores[0].table],
    where.sequence,
    jnp.where(where.real, where.position, -1),
    layers,
    heads=c.num_heads,
    eps=c.norm_eps,
    scale=c.head_dim**-0.5 if c.query_scale is None else c.query_scale,
    dtype=dtype,
  )
  stores = tuple(Paged.of(new, store.table, store.rank) for new, store in zip(pages, stores))
  return y.reshape(x.shape).astype(x.dtype), cache.with_layers(stores)

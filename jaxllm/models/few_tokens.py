"""A few tokens through all layers in one call, where the model is a Llama and a CPU computes it."""

import dataclasses
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


# What a model may choose and still be one whose layers are RMSNorm, rotated heads without biases, RMSNorm, SwiGLU. All
# else has to stand at its default: a choice that is not known here is not computed here.
FREE = {
  *("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len"),
  *(
    "query_scale",
    "sliding_window",
    "layer_pattern",
    "rope_theta",
    "rope_local_theta",
    "rope_fraction",
    "rope_scaling",
  ),
  *("position_offset", "sinusoidal_theta", "alibi_scale", "relative_buckets", "relative_max_distance"),  # unused here
  *("norm_eps", "norm_bias", "norm_unit_offset", "embedding_norm", "final_norm", "num_encoder_layers"),
  *("tie_embeddings", "num_token_types", "embedding_scale", "embedding_dim", "decoder_start_id"),
  *("head", "num_labels", "head_bias", "head_dense", "head_norm", "pooling", "logit_scale", "logit_softcap"),
  *("init", "init_std"),
}
LLAMA = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name not in FREE}


def _is_llama(c: ModelConfig) -> bool:
  """Whether every layer is one that the kernel knows."""
  plain = all(getattr(c, name) == choice for name, choice in LLAMA.items())
  return plain and c.layer_kinds == ("global",) and c.rotary_dim == c.head_dim


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

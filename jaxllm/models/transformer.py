"""The Transformer: embedding, a scanned stack of one block, head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.kernels import backends
from jaxllm.models import positions as pos
from jaxllm.models.attention import Attention, KVCache, Placement
from jaxllm.models.config import Compute, ModelConfig
from jaxllm.models.initializers import embedding_init, matrix_init
from jaxllm.models.linear import parameter, project
from jaxllm.models.mlp import MLP
from jaxllm.models.norms import Norm
from jaxllm.models.remat import remat
from jaxllm.parallel.sharding import constrain

# XLA:CPU is faster on straight code than in a loop; beyond this depth its compile time is not worth it.
CPU_UNROLL = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerLayer:
  """A parameter of all layers as one array a layer, in place of one array with a leading layer axis."""

  arrays: tuple[Array, ...]

  def __getitem__(self, layer: int) -> Array:
    return self.arrays[layer]


def is_per_layer(value) -> bool:
  """Whether a parameter is kept layer by layer."""
  return isinstance(value, PerLayer)


class Block(nnx.Module):
  """Attention and feed-forward on a residual stream, with norms where the config places them."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    self.placement, self.parallel = c.norm_placement, c.parallel_residual
    norm = functools.partial(Norm, c, compute, rngs=rngs)
    self.attention = Attention(c, compute, rngs=rngs)
    self.mlp = MLP(c, compute, rngs=rngs)
    if c.norm_placement in ("pre", "sandwich"):
      self.attention_norm, self.mlp_norm = norm(), norm()
    if c.norm_placement != "pre":
      self.attention_post_norm, self.mlp_post_norm = norm(), norm()

  def __call__(
    self, x: Float[Array, "B T D"], place: Placement, kind: str, cache: KVCache | None = None
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    before = self.placement in ("pre", "sandwich")
    after = self.placement in ("sandwich", "output")
    h, cache = self.attention(self.attention_norm(x) if before else x, place, kind, cache)
    h = self.attention_post_norm(h) if after else h
    if self.parallel:
      return constrain(x + h + self.mlp(self.mlp_norm(x)), "batch", "seq", None), cache
    x = x + h
    x = self.attention_post_norm(x) if self.placement == "post" else x
    h = self.mlp(self.mlp_norm(x) if before else x)
    h = self.mlp_post_norm(h) if after else h
    x = constrain(x + h, "batch", "seq", None)
    return self.mlp_post_norm(x) if self.placement == "post" else x, cache


class Embedding(nnx.Module):
  """Token vectors, plus position vectors where positions are added and not rotated."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs):
    self.c, self.dtype = c, compute.dtype
    self.tokens = parameter(rngs, (c.vocab_size, c.embed_dim), ("vocab", "embed"), embedding_init(c))
    if c.position == "learned":
      self.positions = parameter(rngs, (c.max_seq_len, c.embed_dim), (None, "embed"), embedding_init(c))
    self.norm = Norm(c, compute, rngs=rngs) if c.embedding_norm else None

  def __call__(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # FSDP gathers the table, not the activations: a lookup in a table split along D would come out split so.
    table = constrain(self.tokens.get_value().astype(self.dtype), "vocab", None)
    x = constrain(jnp.take(table, tokens, axis=0), "batch", "seq", None)
    if self.c.embedding_scale is not None:
      x = x * jnp.asarray(self.c.embedding_scale, x.dtype)
    if self.c.position == "learned":
      x = x + jnp.take(constrain(self.positions[...].astype(x.dtype), None, None), positions, axis=0)
    elif self.c.position == "sinusoidal":
      x = x + pos.sinusoidal(positions, self.c.embed_dim).astype(x.dtype)
    return x if self.norm is None else self.norm(x)


class Head(nnx.Module):
  """The output matrix of a model that does not share its embedding, and the bias of one that has it."""

  def __init__(self, c: ModelConfig, *, rngs):
    if not c.tie_embeddings:
      init = matrix_init(c, c.embed_dim)
      self.weight = parameter(rngs, (c.embed_dim, c.vocab_size), ("embed", "vocab"), init)
    self.bias = parameter(rngs, (c.vocab_size,), ("vocab",), nnx.initializers.zeros) if c.head_bias else None


class Transformer(nnx.Module):
  """A decoder language model. `split` it, keep the parameters as a plain dict, `nnx.merge` to call it."""

  def __init__(self, c: ModelConfig, compute: Compute, *, rngs: nnx.Rngs):
    self.config, self.compute = c, compute
    self.embedding = Embedding(c, compute, rngs=rngs)
    self.blocks = stack(lambda r: Block(c, compute, rngs=r), c.num_layers, rngs)
    self.final_norm = Norm(c, compute, rngs=rngs) if c.final_norm else None
    self.head = Head(c, rngs=rngs) if not c.tie_embeddings or c.head_bias else None

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
  ) -> tuple[Float[Array, "B T V"], KVCache | None]:
    """float32 logits [B, T, V] and the advanced cache (None without one); see `hidden`."""
    x, cache = self.hidden(tokens, positions=positions, segment_ids=segment_ids, cache=cache)
    return self.logits(x), cache

  def hidden(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """The last layer's normalised output [B, T, D], before the head.

    Args:
      positions: of each token in its document; by default counted from 0, or from the cache's length.
      segment_ids: packed documents see only themselves; 0 is padding. Not with a cache.
      cache: earlier tokens; the new ones are written after them.
    """
    c = self.config
    if positions is None:
      start = 0 if cache is None else cache.length[:, None]
      positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
    rope = {}
    if c.position == "rope":
      rope = {kind: pos.rope_table(c, positions, kind == "local") for kind in set(c.layer_kinds)}
    place = Placement(rope, segment_ids, positions)
    x = self.embedding(tokens, positions)
    x, cache = self._layers(x, place, cache)
    return x if self.final_norm is None else self.final_norm(x), cache

  def _layers(self, x, place, cache):
    """The stack: scanned in training, straight code for a cache or for layers that are not stacked."""
    graph, weights = nnx.split(self.blocks)
    straight = cache is not None or any(map(is_per_layer, jax.tree.leaves(weights, is_leaf=is_per_layer)))
    return (self._straight if straight else self._scanned)(graph, weights, x, place, cache)

  def _straight(self, graph, weights, x, place, cache):
    """One layer after the other: in a loop XLA would copy each layer's weights and cache for every token."""
    kinds, caches = self.config.layer_kinds, []
    for i in range(self.config.num_layers):
      one = jax.tree.map(lambda w, i=i: w[i], weights, is_leaf=is_per_layer)
      before = None if cache is None else KVCache(cache.key[i], cache.value[i], cache.length)
      x, after = nnx.merge(graph, one)(x, place, kinds[i % len(kinds)], before)
      caches.append(after)
    if cache is not None:
      keys, values = tuple(c.key for c in caches), tuple(c.value for c in caches)
      cache = KVCache(keys, values, cache.length + x.shape[1])
    return x, cache

  def _scanned(self, graph, weights, x, place, cache):
    """One repetition of the layer pattern per scan step; a rest runs after the scan."""
    c, kinds = self.config, self.config.layer_kinds

    def layer(x, weights, kind):
      return nnx.merge(graph, weights)(x, place, kind)[0]

    def group(x, weights, kinds=kinds):
      for j, kind in enumerate(kinds):
        one = jax.tree.map(lambda w, j=j: w[j], weights)
        x = remat(functools.partial(layer, kind=kind), self.compute)(x, one)
      return x, None

    steps, rest = divmod(c.num_layers, len(kinds))
    if steps:
      grouped = jax.tree.map(lambda w: w[: steps * len(kinds)].reshape(steps, len(kinds), *w.shape[1:]), weights)
      x, _ = jax.lax.scan(group, x, grouped, unroll=self._unroll(steps))
    if rest:
      last = jax.tree.map(lambda w: w[steps * len(kinds) :], weights)
      x, _ = group(x, last, kinds=kinds[:rest])
    return x, cache

  def _unroll(self, steps: int) -> int:
    if self.compute.unroll_layers is not None:
      return max(1, min(steps, self.compute.unroll_layers // len(self.config.layer_kinds)))
    on_cpu = backends.TARGETS[self.compute.target] == "cpu"
    return steps if on_cpu and self.config.num_layers <= CPU_UNROLL else 1

  def head_weight(self) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    if self.config.tie_embeddings:
      return self.embedding.tokens.get_value().T
    return self.head.weight.get_value()

  def head_bias(self) -> Float[Array, " V"] | None:
    """What is added to the logits, if anything."""
    return self.head.bias[...] if self.config.head_bias else None

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """float32 logits of hidden states."""
    backend = backends.choose("matmul", self.compute.matmul, self.compute.target)
    if self.config.tie_embeddings and isinstance(tokens := self.embedding.tokens.get_value(), jax.Array):
      # Contracted as it lies: XLA:CPU would copy the transposed matrix for every token.
      logits = jnp.einsum("BTD,VD->BTV", x, tokens.astype(x.dtype)).astype(jnp.float32)
    else:
      logits = project(x, self.head_weight(), backend=backend).astype(jnp.float32)
    if self.config.head_bias:
      logits = logits + self.head_bias()
    if self.config.logit_softcap is not None:
      logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
    return constrain(logits, "batch", "seq", "vocab")


def stack(build, count: int, rngs: nnx.Rngs):
  """`count` modules as one, every parameter with a leading axis named "layers"."""
  split = nnx.vmap(build, in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
  return split(rngs.split(count))

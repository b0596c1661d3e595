"""The Transformer: embedding, a scanned stack of one block, head."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels.elementwise import materialized
from jaxllm.models import positions as pos
from jaxllm.models.attention import Placement
from jaxllm.models.caches import Cache, KVCache, NoCache
from jaxllm.models.config import Compute, ModelConfig, check_batch_invariant
from jaxllm.models.convolution import Convolution
from jaxllm.models.head import Head
from jaxllm.models.initializers import embedding_init, matrix_init
from jaxllm.models.linear import Linear, parameter
from jaxllm.models.moe import RouterLosses
from jaxllm.models.norms import Norm
from jaxllm.models.stack import run_blocks, stack_blocks
from jaxllm.models.weights import dense, project, project_transposed, rows
from jaxllm.parallel.sharding import constrain


class Embedding(nnx.Module):
  """Token vectors, plus those of segments and of positions where these are added and not rotated."""

  def __init__(self, c: ModelConfig, compute: Compute, *, own_tokens: bool = True, rngs):
    self.c, self.dtype = c, compute.dtype
    self.elementwise = compute.backend("elementwise")

    def table(count, dim, axis=None):
      return parameter(rngs, (count, dim), (axis, "embed"), embedding_init(c))

    self.tokens_first = c.embedding_projection == "tokens"
    self.dim = c.embed_dim if self.tokens_first else c.token_dim  # of what is summed
    self.tokens = table(c.vocab_size, c.token_dim, "vocab") if own_tokens else None
    self.positions = table(c.max_seq_len + c.position_offset, self.dim) if c.position == "learned" else None
    self.token_types = table(c.num_token_types, self.dim) if c.num_token_types else None
    self.norm = Norm(c, compute, self.dim, rngs=rngs) if c.embedding_norm else None
    settings = {"init": matrix_init(c, c.token_dim), "bias": not self.tokens_first, "compute": compute, "rngs": rngs}
    linear = lambda: Linear(c.token_dim, c.embed_dim, (None, "embed"), **settings)  # noqa: E731
    self.projection = None if c.token_dim == c.embed_dim else linear()

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    token_types: Int[Array, "B T"] | None = None,
    vectors: Float[Array, "V D"] | None = None,
  ) -> Float[Array, "B T D"]:
    """`vectors`: the decoder's token vectors, which an encoder shares."""
    vectors = self.tokens.get_value() if vectors is None else vectors
    x = constrain(rows(vectors, tokens, self.dtype, "vocab"), "batch", "seq", None)
    if self.c.embedding_scale is not None:
      x = materialized(x * jnp.asarray(self.c.embedding_scale, x.dtype), backend=self.elementwise)
    if self.projection is not None and self.tokens_first:
      x = self.projection(x)
    if self.token_types is not None:
      types = jnp.zeros_like(tokens) if token_types is None else token_types
      x = x + rows(self.token_types.get_value(), types, x.dtype)
    if self.c.position == "learned":
      x = x + rows(self.positions.get_value(), positions + self.c.position_offset, x.dtype)
    elif self.c.position == "sinusoidal":
      places = positions + self.c.position_offset
      vectors = pos.sinusoidal(places, self.dim, self.c.sinusoidal_theta).astype(x.dtype)
      x = x + jnp.where(positions[..., None] < 0, 0, vectors)
    x = x if self.norm is None else self.norm(x)
    return x if self.projection is None or self.tokens_first else self.projection(x)


class Transformer(nnx.Module):
  """A language model. `split` it, keep the parameters as a plain dict, `nnx.merge` to call it.

  The encoder of an encoder_decoder is another Transformer inside it, without a head.
  """

  def __init__(self, c: ModelConfig, compute: Compute, *, own_tokens: bool = True, rngs: nnx.Rngs):
    if compute.batch_invariant:
      check_batch_invariant(c)
    self.config, self.compute = c, compute
    self.embedding = Embedding(c, compute, own_tokens=own_tokens, rngs=rngs)
    if c.relative_bias == "disentangled":
      self.relative_vectors = parameter(rngs, (2 * c.relative_buckets, c.embed_dim), (None, "embed"), embedding_init(c))
      self.relative_norm = Norm(c, compute, rngs=rngs)
    elif c.has_relative_bias:
      shape = (c.relative_buckets, c.num_heads)
      self.relative_bias = parameter(rngs, shape, (None, "heads"), embedding_init(c))
    self.blocks = stack_blocks(c, compute, rngs)
    self.convolution = Convolution(c, compute, rngs=rngs) if c.convolution_size else None
    self.final_norm = Norm(c, compute, rngs=rngs) if c.final_norm else None
    self.head = Head(c, compute, rngs=rngs)
    if c.architecture == "encoder_decoder":
      self.encoder = Transformer(c.encoder, compute, own_tokens=False, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    **inputs: Array | None,
  ) -> tuple[Float[Array, "B T V"], KVCache | None]:
    """float32 logits (a classifier's: see `classify`) and the advanced cache (None without one); see `hidden`."""
    x, cache = self.hidden(tokens, positions=positions, segment_ids=segment_ids, cache=cache, **inputs)
    return self.logits(x) if self.config.head == "lm" else self.classify(x, segment_ids), cache

  def encode(
    self,
    tokens: Int[Array, "B S"],
    *,
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
  ) -> Float[Array, "B S D"]:
    """The encoder's states, for `hidden(encoded=)`; see there."""
    vectors = self.embedding.tokens.get_value()
    return self.encoder.hidden(tokens, positions=positions, segment_ids=segment_ids, vectors=vectors)[0]

  def hidden(
    self, tokens: Int[Array, "B T"], **inputs: Array | KVCache | None
  ) -> tuple[Float[Array, "B T D"], KVCache | None]:
    """The last layer's normalised output [B, T, D], before the head, and the cache; see `hidden_and_router`."""
    return self.hidden_and_router(tokens, **inputs)[:2]

  def hidden_and_router(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    token_types: Int[Array, "B T"] | None = None,
    cache: KVCache | None = None,
    encoded: Float[Array, "B S D"] | None = None,
    encoded_segment_ids: Int[Array, "B S"] | None = None,
    vectors: Float[Array, "V D"] | None = None,
  ) -> tuple[Float[Array, "B T D"], KVCache | None, RouterLosses | None]:
    """The last layer's normalised output [B, T, D], before the head, the advanced cache, and the losses of the
    routers (`jaxllm.models.moe.router_losses`): the mean over the layers with experts, None if there are none.

    Args:
      positions: of each token in its document; by default counted from 0 (see `position_pad_id`), or from the cache's
        length.
      segment_ids: packed documents see only themselves; 0 is padding. Not with a cache.
      token_types: which of the segments a token belongs to, 0 by default (BERT's token_type_ids).
      cache: earlier tokens; the new ones are written after them.
      encoded: what an encoder_decoder's `encode` returned. With a cache it is needed once: the cache keeps
        each layer's keys and values of it.
      encoded_segment_ids: of the encoder's tokens; a token attends to the states of its own segment. None:
        to all.
      vectors: of the tokens, where the model has none of its own (an encoder inside an encoder_decoder).
    """
    c = self.config
    if cache is not None and segment_ids is not None:
      raise ConfigError("segment_ids are of documents packed in a row; with a cache each row is one document")
    nothing = NoCache(segment_ids, positions, encoded, encoded_segment_ids)
    held: Cache = nothing if cache is None else cache.reading(encoded, encoded_segment_ids)
    slots = held.positions(tokens.shape)
    longest = tokens.shape[1] if positions is None and cache is None else c.max_seq_len  # that a text here may be
    if positions is None and cache is None and c.position_pad_id is not None:
      counted = tokens != c.position_pad_id
      positions = jnp.where(counted, jnp.cumsum(counted, axis=1) - 1, -1)
    positions = jnp.broadcast_to(slots, tokens.shape) if positions is None else positions
    rope, bias, lengths = {}, None, None
    if c.rope_switch is not None and longest > c.rope_switch:
      lengths = held.text_lengths(positions)
    if c.position == "rope":
      rope = {kind: pos.rope_table(c, positions, kind == "local", lengths) for kind in set(c.layer_kinds)}
    distances = None
    if c.relative_bias == "disentangled":
      vectors_of = self.relative_norm(dense(self.relative_vectors.get_value()).astype(self.compute.dtype))
      distances = vectors_of, pos.signed_buckets(c, tokens.shape[1])
    elif c.has_relative_bias:
      table = dense(self.relative_bias.get_value(), jnp.float32)
      bias = pos.relative_bias(c, table, slots, held.num_keys(tokens.shape[1]))
    x = self.embedding(tokens, positions, token_types, vectors)
    place = Placement(rope, bias, distances)
    x, held, losses = run_blocks(self.blocks, c, self.compute, x, place, held, self.convolution)
    return x if self.final_norm is None else self.final_norm(x), held.advance(tokens.shape[1]), losses

  def head_input(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """What the head's matrix multiplies: hidden states after the head's dense layer, norm and scale."""
    scale = self.config.logit_scale
    x = self.head.transform(x)
    return x if scale is None else x * jnp.asarray(scale, x.dtype)

  def head_weight(self) -> tuple[Any, bool]:
    """The weight from `head_input` to logits, and whether it lies transposed: [V, D] and not [D, V]."""
    own = self.head.weight
    return (self.embedding.tokens.get_value(), True) if own is None else (own.get_value(), False)

  def head_bias(self) -> Float[Array, " V"] | None:
    """What is added to the logits, if anything."""
    return self.head.bias[...] if self.config.head_bias else None

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """float32 logits over the vocabulary, of hidden states."""
    logits = self._multiplied(self.head_input(x))
    if self.config.logit_softcap is not None:
      logits = self.config.logit_softcap * jnp.tanh(logits / self.config.logit_softcap)
    return constrain(logits, "batch", "seq", "vocab")

  def mean_logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The mean over the vocabulary of `logits`, before a soft cap, without computing them: the head's mean column."""
    weight, transposed = self.head_weight()
    mean = dense(weight, jnp.float32).mean(0 if transposed else 1)
    bias = self.head_bias().mean() if self.config.head_bias else 0
    return self.head_input(x).astype(jnp.float32) @ mean + bias

  def pooled(self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
    """What stands for each row's text: its first state, or the mean or the last of those that are not padding, after
    the head's dense layer and norm."""
    if self.config.pooling == "first":
      return self.head.transform(x[:, 0])
    if self.config.pooling == "last":
      places = jnp.arange(x.shape[1])
      last = jnp.where(True if segment_ids is None else segment_ids != 0, places, 0).max(-1)
      return self.head.transform(x[jnp.arange(len(x)), jnp.broadcast_to(last, len(x))])
    return self.head.transform(mean_pool(x, segment_ids))

  def classify(
    self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
  ) -> Float[Array, "B *T num_labels"]:
    """float32 logits of the labels: of each row's text, or of every token (of one label too: [B, T, 1]); of a span that
    an answer starts and ends there.

    Raises:
      ConfigError: the model has no classification head.
    """
    if self.config.head not in ("sequence", "token", "span"):
      raise ConfigError(f"a model with the head {self.config.head!r} (model.head) has no labels to choose from")
    x = self.pooled(x, segment_ids) if self.config.head == "sequence" else self.head.transform(x)
    return self._multiplied(x)

  def _multiplied(self, x: Float[Array, "*B D"]) -> Float[Array, "*B outputs"]:
    """float32 x times the head's matrix, and its bias."""
    weight, transposed = self.head_weight()
    product, axes = (project_transposed, ("vocab", "embed")) if transposed else (project, self.head.axes)
    logits = product(x, weight, self.compute, axes, jnp.float32).astype(jnp.float32)
    return logits + self.head_bias() if self.config.head_bias else logits


def mean_pool(x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
  """The mean of each row's states that are not padding."""
  if segment_ids is None:
    return x.mean(axis=1)
  real = (segment_ids != 0)[..., None]
  total = jnp.where(real, x, 0).sum(axis=1, dtype=jnp.float32)
  return (total / jnp.maximum(real.sum(axis=1), 1)).astype(x.dtype)

"""Where tokens stand and what a layer attends to: one protocol for training and for every way of decoding.

A model asks a cache once where its tokens stand (`positions`), each layer hands it queries, keys and values
(`attend`, of latent attention `attend_latent`, of cross-attention `attend_encoded`), and the model moves on by the
tokens that it read (`advance`). `NoCache` holds nothing: training. `KVCache` holds the tokens so far, row by row, and
of each layer a store (`jaxllm.models.stores`).
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import KVPages
from jaxllm.models.config import ModelConfig
from jaxllm.models.stores import AttentionOptions, Contiguous, Paged, Store
from jaxllm.parallel.kernels import attention
from jaxllm.parallel.sharding import constrain


class Cache(Protocol):
  """What a model and its layers ask of a cache."""

  @property
  def keeps(self) -> bool: ...  # whether tokens outlive the call; if not, a loop may run over stacked layers

  @property
  def segment_ids(self) -> Int[Array, "B T"] | None: ...  # of this call's tokens; 0 is padding, None: all are real

  def positions(self, shape: tuple[int, int]) -> Int[Array, "#B T"]: ...  # of a call's tokens among the keys

  def text_lengths(self, positions: Int[Array, "B T"]) -> Int[Array, "#B #T"]: ...  # tokens of each token's text

  def num_keys(self, count: int) -> int: ...  # from position 0 on, for a relative bias; count: tokens of a row

  def attend(self, layer: int, query, key, value, options: AttentionOptions) -> tuple[Array, Self]:
    """softmax(q k^T) v [B, T, N, H] over this call's tokens and those before, and the cache with them."""
    ...

  def attend_latent(
    self, layer: int, expand: Callable, absorb: Callable, finish: Callable, options: AttentionOptions
  ) -> tuple[Array, Self]:
    """`attend` in the form that suits the cache: to `expand()`, queries, keys and values of every head; or to
    `absorb()`, queries [B, T, N, R + r] and what is kept of a token [B, T, 1, R + r], with `finish` of the result's
    first R dimensions."""
    ...

  def attend_encoded(self, layer: int, query, keys_values: Callable, options: AttentionOptions) -> tuple[Array, Self]:
    """Attends to an encoder's states, of which `keys_values(states)` makes the layer's keys and values."""
    ...

  def advance(self, count: int) -> "KVCache | None": ...  # after a call of `count` tokens a row; None: keeps nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoCache:
  """Nothing is kept: tokens see those of their own segment in this call."""

  segment_ids: Int[Array, "B T"] | None = None  # packed documents; None: one document a row
  key_positions: Int[Array, "B T"] | None = None  # in their documents; None: 0, 1, 2, ...
  encoded: Float[Array, "B S D"] | None = None  # the encoder's states, for cross-attention
  encoded_segment_ids: Int[Array, "B S"] | None = None  # None: every state belongs to its row's document
  keeps = False

  def positions(self, shape):
    return jnp.arange(shape[1])[None]

  def text_lengths(self, positions):
    if self.segment_ids is None:
      return positions.max(axis=1, keepdims=True) + 1
    longest = lambda places, ids: jax.ops.segment_max(places, ids, places.shape[0] + 1)[ids]  # noqa: E731
    return jax.vmap(longest)(positions, self.segment_ids) + 1

  def num_keys(self, count):
    return count

  def attend(self, layer, query, key, value, options):
    segments = None if self.segment_ids is None else (self.segment_ids, self.segment_ids)
    places = dict(segment_ids=segments, key_positions=self.key_positions)
    return attention(query, key, value, **places, **vars(options)), self

  def attend_latent(self, layer, expand, absorb, finish, options):
    return self.attend(layer, *expand(), options)

  def attend_encoded(self, layer, query, keys_values, options):
    if self.encoded is None:
      raise ConfigError("an encoder_decoder attends to an encoder's states: give encoded=")
    return _across(query, *keys_values(self.encoded), self.segment_ids, self.encoded_segment_ids, options), self

  def advance(self, count):
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
  """The encoder's side: its states until the first call is over, then each layer's keys and values of them."""

  states: Float[Array, "B S D"] | None
  segment_ids: Int[Array, "B S"] | None
  layers: tuple[tuple[Array, Array], ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """The tokens so far of each row; those of a call are written after them, where they lie, under a donating `jit`.

  A call's tokens are [B, T], B the rows of the cache. With pages they may also stand back to back, [1, tokens], as
  `expecting` says how many each row has. Writing past a row's room is the caller's mistake: the last slots of a
  contiguous cache would be overwritten; a page table's missing entries drop it.
  """

  layers: tuple[Store, ...]  # of each layer, apart so that a step copies nothing
  length: Int[Array, " B"]  # the tokens that each row holds
  count: Int[Array, " B"] | None = None  # the real tokens of the next call; None: all of them
  # Of paged layers, by their kind ("global", "local"): a row's pages in order. Where it has none (yet), a number that
  # is no page's: what would be written there is dropped. Behind the window of a "local" layer: any page without NaN.
  tables: dict[str, Int[Array, "B max_pages"]] = dataclasses.field(default_factory=dict)
  encoded: Encoded | None = None  # of an encoder_decoder
  # Tokens that each row's text had when it was begun to be read: the rotation of a prompt that is read in several calls
  # may hang on it (`ModelConfig.rope_switch`). None: those of this call's end.
  known: Int[Array, " B"] | None = None
  keeps = True
  segment_ids = None

  def positions(self, shape):
    rows, (batch, count) = len(self.length), shape
    if batch == rows:
      return self.length[:, None] + jnp.arange(count)
    if batch != 1 or not self.tables or self.count is None:
      raise ConfigError(
        f"tokens {shape} for a cache of {rows} rows: give [{rows}, T], or with pages, after `expecting`, [1, T]"
      )
    ends, index = jnp.cumsum(self.count), jnp.arange(count)
    return jnp.where(index < ends[-1], (self.length + self.count - ends)[self._row_of(count)] + index, 0)[None]

  def text_lengths(self, positions):
    known = self.length + (positions.shape[1] if self.count is None else self.count)
    known = (known if self.known is None else self.known)[:, None]
    known = known if len(positions) == len(self.length) else known[self._row_of(positions.shape[1]), 0][None]
    return jnp.maximum(positions + 1, known)

  def _row_of(self, count: int) -> Int[Array, " T"]:
    """The row of each of `count` tokens that stand back to back."""
    row = jnp.searchsorted(jnp.cumsum(self.count), jnp.arange(count), side="right")
    return jnp.clip(row, 0, len(self.length) - 1)

  def num_keys(self, count):
    return self.layers[0].num_keys(self)

  def attend(self, layer, query, key, value, options):
    out, store = self.layers[layer].attend(self, query, key, value, options)
    return out, dataclasses.replace(self, layers=(*self.layers[:layer], store, *self.layers[layer + 1 :]))

  def attend_latent(self, layer, expand, absorb, finish, options):
    query, latent = absorb()
    out, cache = self.attend(layer, query, latent, latent, options)
    return finish(out), cache

  def attend_encoded(self, layer, query, keys_values, options):
    if self.encoded is None:
      raise ConfigError("the first call with a cache of an encoder_decoder needs encoded=")
    encoded = self.encoded
    if encoded.states is not None:
      encoded = dataclasses.replace(encoded, layers=(*encoded.layers, keys_values(encoded.states)))
    out = _across(query, *encoded.layers[layer], None, encoded.segment_ids, options)
    return out, dataclasses.replace(self, encoded=encoded)

  def advance(self, count):
    encoded = self.encoded and dataclasses.replace(self.encoded, states=None)
    length = self.length + (count if self.count is None else self.count)
    return dataclasses.replace(self, length=length, count=None, encoded=encoded)

  def with_layers(self, layers: tuple[Store, ...]) -> "KVCache":
    """With these stores, which hold a call's tokens."""
    return dataclasses.replace(self, layers=layers)

  def reading(self, states: Float[Array, "B S D"] | None, segment_ids: Int[Array, "B S"] | None) -> "KVCache":
    """For a call that brings the encoder's states, if any: their keys and values are kept from then on."""
    return self if states is None else dataclasses.replace(self, encoded=Encoded(states, segment_ids))

  def expecting(self, count: Int[Array, " B"]) -> "KVCache":
    """For a call of which each row's first `count` tokens are real; what padding writes is never seen."""
    return dataclasses.replace(self, count=count)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str = "float32") -> KVCache:
  """An empty cache for `batch` rows of up to `length` tokens."""
  heads, dim, rank = _kept(config)
  axes = "batch", None, "kv_heads" if rank is None else None, None
  empty = lambda: constrain(jnp.zeros((batch, length, heads, dim), dtype), *axes)  # noqa: E731
  layers = (Contiguous(empty(), empty() if rank is None else None, rank) for _ in range(config.num_layers))
  return KVCache(tuple(layers), jnp.zeros((batch,), jnp.int32))


def init_paged_cache(
  config: ModelConfig,
  batch: int,
  length: int,
  *,
  pages: int | dict[str, int],
  page_size: int,
  dtype: str = "float32",
  target: str | None = None,
) -> KVCache:
  """An empty cache in pages, whose `tables`, [batch, length / page_size], name none yet.

  Args:
    pages: of each layer; or of the "global" and of the "local" ones, which give back those behind the window.
    dtype: also "int8" and "float8_e4m3fn", with a scale for each token and head.
    target: the chip that the pages are laid out for.
  """
  heads, dim, rank = _kept(config)
  kinds = ["local" if kind == "local" else "global" for kind in config.layer_kinds]
  counts = {kind: pages if isinstance(pages, int) else pages[kind] for kind in kinds}

  def layer(kind):
    empty = KVPages.zeros(counts[kind], page_size, heads, dim, dtype, target=target)
    if empty.heads is None and rank is None:
      empty = jax.tree.map(lambda x: constrain(x, None, "kv_heads", *(None,) * (x.ndim - 2)), empty)
    return Paged.of(empty, kind, rank)

  tables = {kind: jnp.full((batch, -(-length // page_size)), n, jnp.int32) for kind, n in counts.items()}
  layers = (layer(kinds[i % len(kinds)]) for i in range(config.num_layers))
  return KVCache(tuple(layers), jnp.zeros((batch,), jnp.int32), tables=tables)


def _kept(config: ModelConfig) -> tuple[int, int, int | None]:
  """Of a token in a layer: heads, their dimension, and the rank of a latent that stands for keys and values."""
  if config.mla is None:
    return config.num_kv_heads, config.head_dim, None
  return 1, config.mla.kv_lora_rank + config.mla.rope_head_dim, config.mla.kv_lora_rank


def _across(query, key, value, query_segments, key_segments, options):
  """Attention to the encoder's keys: no order, each query those of its segment."""
  ones = lambda ids, y: jnp.ones(y.shape[:2], jnp.int32) if ids is None else ids  # noqa: E731
  none = query_segments is None and key_segments is None
  segments = None if none else (ones(query_segments, query), ones(key_segments, key))
  return attention(query, key.astype(query.dtype), value.astype(query.dtype), segment_ids=segments, **vars(options))

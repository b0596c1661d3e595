"""How one layer's keys and values are kept by a `KVCache`: contiguous or in pages.

`attend(rows, ...)` writes a call's tokens after those that each row has and attends to all. `rows` is the cache: its
`length`, `count` and `tables` say where rows stand (`jaxllm.models.caches`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import KVPages, Visibility, write_pages
from jaxllm.parallel.kernels import attention, paged_attention
from jaxllm.parallel.sharding import activation_context


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("sinks", "alibi_slopes", "bias"),
  meta_fields=("visibility", "scale", "softcap", "backend", "target", "return_lse"),
)
@dataclasses.dataclass(frozen=True)
class AttentionOptions:
  """What a layer asks of attention, whatever the cache; see `jaxllm.kernels.flash_attention`."""

  scale: float | None
  backend: str
  target: str
  visibility: Visibility = Visibility()
  softcap: float | None = None
  sinks: Float[Array, " N"] | None = None
  alibi_slopes: Float[Array, " N"] | None = None
  bias: Float[Array, "#B N T S"] | None = None
  return_lse: bool = False  # `attend` gives the log-sum-exp [B, N, T] of the scores beside the result


@functools.partial(jax.tree_util.register_dataclass, data_fields=("key", "value"), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class Contiguous:
  """Slot s of row b holds the token at position s. With a rank there is no value: it is the key's first part."""

  key: Float[Array, "B S K H"]
  value: Float[Array, "B S K H"] | None
  rank: int | None = None

  def attend(self, rows, query, key, value, options):
    keys = _write(self.key, key, rows.length)
    values = None if self.value is None else _write(self.value, value, rows.length)
    store = dataclasses.replace(self, key=keys, value=values)
    keys = keys.astype(query.dtype)
    values = keys if values is None else values.astype(query.dtype)  # whole, as the kernels take them
    out = attention(query, keys, values, query_offset=rows.length, **vars(options))
    return out if options.return_lse else out[..., : self.rank], store

  def num_keys(self, rows):
    return self.key.shape[1]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("pages",), meta_fields=("table", "rank"))
@dataclasses.dataclass(frozen=True)
class Paged:
  """Pages, of which `rows.tables[table]` names each row's (`jaxllm.kernels.paged`); with a rank, of latents alone."""

  pages: KVPages
  table: str
  rank: int | None = None

  @classmethod
  def of(cls, pages: KVPages, table: str, rank: int | None) -> "Paged":
    """Of pages with both; of latents, values are the keys' first part."""
    return cls(pages if rank is None else dataclasses.replace(pages, values=None, value_scales=None), table, rank)

  def attend(self, rows, query, key, value, options):
    table, (B, T) = rows.tables[self.table], query.shape[:2]
    order, back, starts, lengths = _back_to_back(rows, B, T)
    flat = lambda x: x.reshape(B * T, *x.shape[2:])[order]  # noqa: E731
    pages = write_pages(self._both(), flat(key), flat(value), table, lengths, starts)
    store = Paged.of(pages, self.table, self.rank)
    if options.bias is not None or options.visibility.sink_tokens:  # the paged kernels have neither
      if len(rows.length) != B:
        raise ConfigError("relative positions and sink tokens read pages row by row: give tokens [rows, T]")
      out = attention(query, *store._gather(table, lengths, query.dtype), query_offset=rows.length, **vars(options))
      return out if options.return_lse else out[..., : self.rank], store
    asked = vars(options) | {"window": options.visibility.window}
    asked = {name: asked[name] for name in asked.keys() - {"visibility", "bias"}}
    out = paged_attention(flat(query), store._both(), table, lengths, starts, **asked)
    rows_of = lambda x: x[back].reshape(B, T, *x.shape[1:])  # noqa: E731
    if options.return_lse:
      return (rows_of(out[0]), jnp.swapaxes(rows_of(out[1]), 1, 2)), store
    return rows_of(out)[..., : self.rank], store

  def num_keys(self, rows):
    return rows.tables[self.table].shape[1] * self.pages.page_size

  def _both(self) -> KVPages:
    p = self.pages
    return p if self.rank is None else dataclasses.replace(p, values=p.keys, value_scales=p.key_scales)

  def _gather(self, table, lengths, dtype):
    """Keys and values [B, S, K, H] of all rows, zeros where no token is written."""
    pages, ids = self._both(), jnp.clip(table, 0, self.pages.keys.shape[0] - 1)

    def read(array, scales):
      x = jnp.moveaxis(pages.split(array[ids]), 2, 3)  # [B, pages, page_size, K, H]
      x = x.astype(dtype) if scales is None else x.astype(dtype) * jnp.moveaxis(scales[ids], 2, 3)[..., None]
      x = x.reshape(len(table), -1, *x.shape[3:]).astype(dtype)
      return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None])[..., None, None], x, 0)

    return read(pages.keys, pages.key_scales), read(pages.values, pages.value_scales)


def _write(buffer, new, start):
  """buffer[b, start[b] :][:T] = new[b]."""

  def scatter(buffer, new, start):
    put = lambda row, tokens, start: jax.lax.dynamic_update_slice_in_dim(row, tokens, start, axis=0)  # noqa: E731
    return jax.vmap(put)(buffer, new, start)

  def loop(buffer, new, start):
    put = lambda b, buffer: jax.lax.dynamic_update_slice(buffer, new[b][None], (b, start[b], 0, 0))  # noqa: E731
    return jax.lax.fori_loop(0, len(new), put, buffer)

  new = new.astype(buffer.dtype)
  if buffer.dtype.itemsize != 2 or activation_context() is not None:
    return scatter(buffer, new, start)
  # XLA for CPU scatters small floats by way of float32: two copies of the whole layer.
  return jax.lax.platform_dependent(buffer, new, start, cpu=loop, default=scatter)


def _back_to_back(rows, B: int, T: int):
  """A call's B * T tokens as `paged_attention` takes them: their order, padding last, and the way back; where each row
  begins among them (None: a token a row); and the tokens of each row, new ones included."""
  count = jnp.full_like(rows.length, T) if rows.count is None else rows.count
  if T == 1 and len(count) == B:
    return ..., ..., None, jnp.where(count > 0, rows.length + 1, 0)
  order: Any = ...
  back: Any = ...
  if rows.count is not None and len(count) == B:
    order = jnp.argsort((jnp.arange(T) >= count[:, None]).reshape(-1), stable=True)
    back = jnp.argsort(order)
  return order, back, jnp.concatenate([jnp.zeros(1, count.dtype), jnp.cumsum(count)]), rows.length + count


Store = Contiguous | Paged

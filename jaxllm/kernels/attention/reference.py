"""Attention in plain JAX, query block by query block: what every other backend is measured against."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.kernels import tuning
from jaxllm.kernels.attention.options import Options, visible

MASKED = -1e30  # finite, so that a row with no visible key gives zeros and not NaN
QUERY_BLOCK = 512  # queries whose scores are held at once


@dataclasses.dataclass(frozen=True)
class Tiles:
  """queries: of a block, whose scores are held at once."""

  queries: int


def forward(
  call,
  query: Float[Array, "B T N H"],
  key: Float[Array, "B S K H"],
  value: Float[Array, "B S K H"],
  options: Options,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
  """The result and the log-sum-exp of the scores; differentiable in everything, slopes and bias too."""
  (B, length), bias = query.shape[:2], options.bias
  offset = jnp.zeros(B, jnp.int32) if options.query_offset is None else options.query_offset
  tiles = tuning.tiles("attention_xla", call.target, Tiles(QUERY_BLOCK), dtype=query.dtype.name)
  if length <= tiles.queries:
    return _dense(query, key, value, options, offset, options.query_segments, bias)

  # Longer than a block: queries go block by block and scores are recomputed in the backward pass, so
  # that memory grows with T and not with T * S.
  pad = -length % tiles.queries
  blocks = (length + pad) // tiles.queries

  def in_blocks(x):
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, tiles.queries, *x.shape[2:]), 1, 0)

  @jax.checkpoint
  def one(block):
    q, start, segments, rows = block
    rows = None if rows is None else jnp.moveaxis(rows, 1, 2)
    return _dense(q, key, value, options, offset + start, segments, rows)

  segments = None if options.query_segments is None else in_blocks(options.query_segments)
  bias_rows = None if bias is None else in_blocks(jnp.moveaxis(bias, 2, 1))
  starts = jnp.arange(blocks) * tiles.queries
  out, lse = jax.lax.map(one, (in_blocks(query), starts, segments, bias_rows))
  out = jnp.moveaxis(out, 0, 1).reshape(B, length + pad, query.shape[2], -1)[:, :length]
  return out, jnp.moveaxis(lse, 0, 2).reshape(B, query.shape[2], length + pad)[:, :, :length]


def visible_keys(options, offset, T, S, query_segments):
  """[B or 1, T, S] boolean: may query t see key s?"""
  row = {"query_segments": query_segments, "key_segments": options.key_segments, "key_positions": options.key_positions}
  row = {name: array for name, array in row.items() if array is not None}
  row = {name: x[:, :, None] if name.startswith("query") else x[:, None, :] for name, x in row.items()}
  if options.prefix_lengths is not None:
    row["prefix_length"] = options.prefix_lengths[:, None, None]
  t = offset[:, None, None] + jnp.arange(T)[None, :, None]
  return visible(options, t, jnp.arange(S)[None, None, :], row)


def _dense(query, key, value, options, offset, query_segments, bias):
  """All scores of the block at once."""
  B, T, N, H = query.shape
  S, K = key.shape[1:3]
  grouped = query.reshape(B, T, K, N // K, H)
  scores = options.scale * jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
  if options.softcap is not None:
    scores = options.softcap * jnp.tanh(scores / options.softcap)
  if options.alibi_slopes is not None:
    distance = jnp.abs(offset[:, None, None] + jnp.arange(T)[None, :, None] - jnp.arange(S)[None, None, :])
    slopes = options.alibi_slopes.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    scores -= slopes * distance[:, None, None].astype(jnp.float32)
  if bias is not None:
    scores += bias.astype(jnp.float32).reshape(bias.shape[0], K, N // K, T, S)
  seen = visible_keys(options, offset, T, S, query_segments)[:, None, None]
  scores = jnp.where(seen, scores, MASKED)
  top = scores.max(-1, keepdims=True)
  if options.sinks is not None:
    sink = options.sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    top = jnp.maximum(top, sink)
  top = jax.lax.stop_gradient(top)
  weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
  total = weights.sum(-1, keepdims=True)
  if options.sinks is not None:
    total += jnp.exp(sink - top)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
  probabilities = (weights / total).astype(value.dtype)
  out = jnp.einsum("BKGTS,BSKH->BTKGH", probabilities, value).reshape(B, T, N, -1)
  return out, lse.reshape(B, N, T)

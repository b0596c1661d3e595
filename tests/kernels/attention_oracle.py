"""Attention and its derivative in float64 numpy, written from the definition; the oracle of every backend."""

import dataclasses

import numpy as np


def visible(v, B, T, S, *, offset=None, segments=None, positions=None, prefix=None):
  """[B, T, S]: may query t of row b see key s? segments: of queries [B, T] and of keys [B, S]."""
  at = np.arange(T)[None, :, None] + np.asarray([0] * B if offset is None else offset)[:, None, None]
  s = np.arange(S)[None, None, :]
  seen = np.ones((B, T, S), bool)
  if v.window is not None:
    seen &= np.abs(at - s) < v.window
    positions = np.broadcast_to(np.arange(S), (B, S)) if positions is None else positions
    seen |= (positions < v.sink_tokens)[:, None, :]
  if v.causal:
    seen &= s <= at
  if prefix is not None:
    seen |= s < np.asarray(prefix)[:, None, None]
  if segments is not None:
    of_queries, of_keys = (np.asarray(x) for x in segments)
    seen &= (of_queries[:, :, None] == of_keys[:, None, :]) & (of_keys != 0)[:, None, :]
  return seen


@dataclasses.dataclass
class Result:
  out: np.ndarray
  lse: np.ndarray  # [B, N, T], -inf where nothing is seen
  d_query: np.ndarray
  d_key: np.ndarray
  d_value: np.ndarray
  d_sinks: np.ndarray


def attention(q, k, v, d_out, seen, *, d_lse=None, scale=None, softcap=None, sinks=None, slopes=None, offset=None):
  """Everything of one call, by the softmax's derivative and not by automatic differentiation."""
  q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  scale = H**-0.5 if scale is None else scale
  slopes = np.zeros(N) if slopes is None else np.asarray(slopes, np.float64)
  sinks = np.full(N, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
  at = np.arange(T)[None, :, None] + np.asarray([0] * B if offset is None else offset)[:, None, None]
  distance = np.abs(at - np.arange(S))
  r = Result(np.zeros((B, T, N, v.shape[-1])), np.full((B, N, T), -np.inf), *map(np.zeros_like, (q, k, v)), np.zeros(N))
  for n in range(N):
    g = n // (N // K)
    raw = scale * np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, g])
    scores, slope_of_cap = raw, 1.0
    if softcap is not None:
      scores = softcap * np.tanh(raw / softcap)
      slope_of_cap = 1 - np.tanh(raw / softcap) ** 2
    scores = np.where(seen, scores - slopes[n] * distance, -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), sinks[n])
    top = np.where(np.isfinite(top), top, 0.0)
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True) + np.exp(sinks[n] - top)
    with np.errstate(divide="ignore"):
      r.lse[:, n] = (top + np.log(total))[..., 0]
    p = np.divide(e, total, out=np.zeros_like(e), where=total > 0)
    r.out[:, :, n] = np.einsum("bts,bsh->bth", p, v[:, :, g])
    dp = np.einsum("bth,bsh->bts", d_out[:, :, n], v[:, :, g])
    delta = (p * dp).sum(-1, keepdims=True)
    if d_lse is not None:
      delta = delta - np.asarray(d_lse, np.float64)[:, n, :, None]
    ds = p * (dp - delta) * slope_of_cap * scale
    r.d_query[:, :, n] = np.einsum("bts,bsh->bth", ds, k[:, :, g])
    r.d_key[:, :, g] += np.einsum("bts,bth->bsh", ds, q[:, :, n])
    r.d_value[:, :, g] += np.einsum("bts,bth->bsh", p, d_out[:, :, n])
    share = np.divide(np.exp(sinks[n] - top), total, out=np.zeros_like(total), where=total > 0)
    r.d_sinks[n] = -(share * delta).sum()
  return r

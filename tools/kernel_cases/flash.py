"""Cases of `flash_attention`, forward and backward, with every option."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import kernels
from kernel_cases import peers
from kernel_cases.case import ROWS, SDS, Case, alone, float64, joined, tagged


def attention(
  B,
  T,
  N,
  K,
  H,
  *,
  dtype=jnp.bfloat16,
  causal=True,
  backward=False,
  S=None,
  window=None,
  sink_tokens=0,
  segments=0,
  prefix=0,
  softcap=None,
  alibi=False,
  sinks=False,
  lse=False,
) -> Case:
  """Attention forward, or the gradients of queries, keys and values (which computes the forward pass again).

  Args:
    S: keys, if they are more than T: the queries come last, as after a cache.
    segments: so many documents of one length in a row; prefix: so many keys that all queries see.
  """
  S = S or T
  q, k = SDS((B, T, N, H), dtype), SDS((B, S, K, H), dtype)
  visibility = kernels.Visibility(causal=causal, window=window, sink_tokens=sink_tokens)
  slopes = 2.0 ** (-8 * np.arange(1, N + 1) / N)

  def arrays(rng):
    """The options that are arrays."""
    found = {}
    if S != T:
      found["query_offset"] = jnp.full(B, S - T, jnp.int32)
    if segments:
      found["segments"] = jnp.broadcast_to(1 + jnp.arange(T, dtype=jnp.int32) // (T // segments), (B, T))
    if sink_tokens:
      found["key_positions"] = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    if prefix:
      found["prefix_lengths"] = jnp.full(B, prefix, jnp.int32)
    if alibi:
      found["alibi_slopes"] = jnp.asarray(slopes, jnp.float32)
    if sinks:
      found["sinks"] = jnp.asarray(rng.standard_normal((N,), dtype=np.float32))
    return found

  inputs = (q, k, k, q) if backward else (q, k, k)
  extra = jax.eval_shape(lambda: arrays(np.random.default_rng(0)))

  def make(rng):
    values = tuple(jnp.asarray(rng.standard_normal(s.shape, dtype=np.float32)).astype(s.dtype) for s in inputs)
    return (*values, arrays(rng)) if extra else values

  def call(attend):
    """(q, k, v[, d_out][, arrays]) -> the result, or the gradients."""

    def run(q, k, v, *rest):
      attend_here = functools.partial(attend, **rest[-1]) if extra else attend
      return jax.vjp(attend_here, q, k, v)[1](rest[0]) if backward else attend_here(q, k, v)

    return run

  def ours(backend, target):
    def attend(q, k, v, segments=None, **given):
      return kernels.flash_attention(
        *(q, k, v),
        visibility=visibility,
        segment_ids=None if segments is None else (segments, segments),
        softcap=softcap,
        return_lse=lse,
        backend=backend,
        target=target,
        **given,
      )

    return call(attend)

  name = f"B{B} T{T}{f' S{S}' if S != T else ''} N{N} K{K} H{H} {'causal' if causal else 'full'}"
  name += f" softcap {softcap:g}" if softcap else ""
  name += f" {segments} segments" if segments else ""
  name += f" window {window}" if window else ""
  for what, count in (("sink tokens", sink_tokens), ("prefix", prefix)):
    name += f" {what} {count}" if count else ""
  name += "".join(f" {what}" for what, asked in (("alibi", alibi), ("sinks", sinks), ("lse", lse)) if asked)
  pairs = B * N * _pairs(T, S, causal, window, sink_tokens, segments, prefix)
  options = {"window": window, "softcap": softcap, "segments": segments}
  simple = not (prefix or alibi or sinks or lse or sink_tokens or S != T)
  found = peers.attention(N, T, H, dtype, causal, backward, **options) if simple else {}
  plain = simple and not any(options.values())

  def oracle(inputs, result):
    given = {key: np.asarray(value) for key, value in (inputs[-1] if extra else {}).items()}
    return _oracle(inputs, result, visibility, softcap, given, backward)

  return Case(
    op="attention backward" if backward else "attention",
    name=f"{name} {jnp.dtype(dtype).name}",
    inputs=(*inputs, extra) if extra else inputs,
    ours=ours,
    others={peer: call(attend) for peer, attend in found.items()},
    oracle=oracle,
    flops=pairs * H * 4 * (3.5 if backward else 1.0),
    bytes=2 * (q.size + k.size) * jnp.dtype(dtype).itemsize * (2 if backward else 1),
    make=make,
    parts=functools.partial(_backward_parts, 2 * pairs * H) if backward else alone(4 * pairs * H),
    width=H,
    torch=functools.partial(_torch_attention, causal) if plain and not backward else None,
  )


def _pairs(T, S, causal, window, sink_tokens, segments, prefix) -> float:
  """Of a query and a key that it sees, in one row and head."""
  length = T // (segments or 1)
  if not causal:
    return float(T * (min(S, 2 * window - 1) if window else S // (segments or 1)))
  seen = T * (S - T) + T * length / 2
  if window and window < S:
    seen = T * window - (window * window / 2 if S == T else 0) + T * sink_tokens
  return seen + prefix * prefix / 2


def _backward_parts(product: float, names: list[str]) -> list[float | None]:
  """FLOP of the kernels of a backward pass, by their names; product: of one of the products of a pass.

  A kernel for dq needs three products, one for dk and dv four, one for all five, and the forward pass two. Of kernels
  without a name of their own (jax's FA3, tokamax on GPUs) that for dq comes first, as their numbers of products say.
  """
  nameless = [name for name in names if re.search(r"body|anonymous", name)]
  of_queries = [bool(re.search(r"query|dq", name)) or [name] == nameless[:1] for name in names]
  of_keys = [bool(re.search(r"key|dkv|bwd|backward", name)) or name in nameless for name in names]
  counts = [3 if q else (4 if any(of_queries) else 5) if k else 2 for q, k in zip(of_queries, of_keys)]
  if counts.count(2) != 1 or len(counts) > 3:  # another division of the work
    return [None] * len(names)
  return [count * product for count in counts]


def _oracle(inputs, result, visibility, softcap, given, backward):
  """Of row 0: head 0 of the first, the middle and the last queries; keys and values of the last keys."""
  q, k, v = (np.asarray(x[0]) for x in inputs[:3])
  T, N, H = q.shape
  S, G = k.shape[0], N // k.shape[1]
  k, v, keys = float64(k[:, 0]), float64(v[:, 0]), np.arange(S)
  offset = given["query_offset"][0] if "query_offset" in given else 0
  sinks = float64(given["sinks"]) if "sinks" in given else np.full(N, -np.inf)
  slopes = float64(given["alibi_slopes"]) if "alibi_slopes" in given else np.zeros(N)

  def seen(rows, keys):
    at = rows[:, None] + offset
    found = np.ones((len(rows), len(keys)), bool)
    if visibility.window is not None:
      found = (abs(at - keys) < visibility.window) | (keys < visibility.sink_tokens)
    if visibility.causal:
      found &= keys <= at
    if "prefix_lengths" in given:
      found |= keys < given["prefix_lengths"][0]
    if "segments" in given:
      found &= given["segments"][0][rows][:, None] == given["segments"][0][keys]
    return found

  def probabilities(rows, n):
    """(p, derivative of the capped scores, log-sum-exp) of some queries of head n."""
    raw = float64(q[rows, n]) @ k.T * H**-0.5
    capped = softcap * np.tanh(raw / softcap) if softcap else raw
    slope = 1 - (capped / softcap) ** 2 if softcap else 1.0
    scores = np.where(seen(rows, keys), capped - slopes[n] * abs(rows[:, None] + offset - keys), -np.inf)
    top = np.maximum(scores.max(-1, keepdims=True), sinks[n])
    e = np.exp(scores - top)
    total = e.sum(-1, keepdims=True) + np.exp(sinks[n] - top)
    return e / total, slope, (top + np.log(total))[:, 0]

  third = ROWS // 2
  rows = np.unique(np.clip(np.r_[:third, T // 2 : T // 2 + third, T - ROWS : T], 0, T - 1))
  if not backward:
    p, _, lse = probabilities(rows, 0)
    if isinstance(result, tuple):
      return joined((result[0][0, rows, 0], p @ v), (result[1][0, 0, rows], lse))
    return float64(result[0, rows, 0]), p @ v

  d_out = np.asarray(inputs[3][0])

  def scores_gradient(rows, n):
    p, slope, _ = probabilities(rows, n)
    dp = float64(d_out[rows, n]) @ v.T
    return p, p * (dp - (p * dp).sum(-1, keepdims=True)) * slope * H**-0.5

  d_query = scores_gradient(rows, 0)[1] @ k
  last = np.arange(S - ROWS, S)
  d_key, d_value = np.zeros((2, ROWS, H))
  seeing = np.flatnonzero(seen(np.arange(T), last).any(1))  # under a causal mask few
  for part in np.array_split(seeing, -(-len(seeing) // 512)):
    for n in range(G):
      p, ds = scores_gradient(part, n)
      d_key += ds[:, last].T @ float64(q[part, n])
      d_value += p[:, last].T @ float64(d_out[part, n])
  got = result[0][0, rows, 0], result[1][0, last, 0], result[2][0, last, 0]
  return joined(*zip(got, (d_query, d_key, d_value)))


def _torch_attention(causal, q, k, v):
  import torch

  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def cases(family: str) -> list[Case]:
  if family == "cpu":
    small = functools.partial(attention, 4, 1024, 8, 4, 64, dtype=jnp.float32)
    return [
      *tagged("target", *(small(backward=b) for b in (False, True))),
      *tagged("shape", *(attention(4, 256, 8, 4, 64, dtype=jnp.float32, backward=b) for b in (False, True))),
      *tagged("shape", attention(4, 1024, 8, 4, 64)),
      *tagged("option", *(small(**o) for o in ({"window": 256}, {"causal": False}, {"segments": 4}))),
    ]
  both = [
    {"causal": False},
    {"window": 1024},
    {"window": 1024, "sink_tokens": 4},
    {"segments": 4},
    {"prefix": 1024},
    {"alibi": True},
    {"softcap": 50.0},
    {"sinks": True},
  ]
  model = functools.partial(attention, 8, 4096, 32, 8, 128)
  directions = (False, True)
  return [
    *tagged("target", *(attention(32768 // T, T, 32, 8, 128, backward=b) for b in directions for T in (4096, 16384))),
    *tagged("shape", *(attention(32, 1024, 32, 8, 128, backward=b) for b in directions)),
    *tagged("shape", *(attention(8, 4096, 32, 8, H, backward=b) for b in directions for H in (64, 256))),
    *tagged("option", *(model(**options, backward=b) for options in both for b in directions)),
    *tagged("option", model(lse=True), attention(8, 512, 32, 8, 128, S=8192), attention(1, 2048, 32, 8, 128, S=16384)),
    *tagged("option", *(attention(8, 4001, 32, 8, 128, backward=b) for b in directions)),
    *tagged("option", *(attention(8, 4096, 32, 8, H, backward=b) for H in (80, 96, 192) for b in directions)),
    *tagged("option", *(attention(8, 4096, 32, K, 128, backward=b) for K in (1, 32) for b in directions)),
    *tagged("option", attention(8, 4096, 16, 8, 256, softcap=50.0)),
    *tagged("option", *(model(dtype=jnp.float16, causal=c, backward=b) for c in (True, False) for b in directions)),
  ]

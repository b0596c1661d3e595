"""Cases of `paged_attention`: decoding, prefill and both in one call, with every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import kernels
from kernel_cases import peers
from kernel_cases.case import SDS, Case, float64, joined, tagged


def paged_attention(
  B,
  length,
  N,
  K,
  H,
  *,
  page_size=64,
  new=1,
  prefills=None,
  dtype="bfloat16",
  query_dtype=jnp.bfloat16,
  window=None,
  softcap=None,
  alibi=False,
  sinks=False,
  lse=False,
  splits=None,
) -> Case:
  """The newest tokens of each of B sequences that hold `length` tokens, in pages that lie anywhere.

  new: of each sequence; with `prefills`, of so many sequences, while the others decode one.
  """
  count = -(-length // page_size)
  pages = jax.eval_shape(functools.partial(kernels.KVPages.zeros, B * count, page_size, K, H, dtype))
  news = np.full(B, new) if prefills is None else np.where(np.arange(B) < prefills, new, 1)
  T = int(news.sum())
  query, table = SDS((T, N, H), query_dtype), SDS((B, count), jnp.int32)
  slopes = 2.0 ** (-8 * np.arange(1, N + 1) / N)
  decoding = new == 1

  def arrays(rng):
    found = {"kv_lengths": jnp.full(B, length, jnp.int32)}
    if not decoding:
      found["query_starts"] = jnp.asarray(np.r_[0, np.cumsum(news)], jnp.int32)
    if alibi:
      found["alibi_slopes"] = jnp.asarray(slopes, jnp.float32)
    if sinks:
      found["sinks"] = jnp.asarray(rng.standard_normal((N,), dtype=np.float32))
    return found

  def make(rng):
    def draw(x):
      values = rng.standard_normal(x.shape, dtype=np.float32)
      if x.dtype == jnp.int8:
        return jnp.asarray(jnp.clip(40 * values, -127, 127), jnp.int8)
      quantized = pages.key_scales is not None and x.dtype == jnp.float32  # scales
      return jnp.asarray(jnp.abs(values) / 40 if quantized else values, x.dtype)

    places = jnp.asarray(rng.permutation(B * count).reshape(B, count), jnp.int32)
    return draw(query), jax.tree.map(draw, pages), places, arrays(rng)

  def ours(backend, target):
    def attend(q, pages, table, given):
      given = dict(given)
      return kernels.paged_attention(
        *(q, pages, table, given.pop("kv_lengths"), given.pop("query_starts", None)),
        window=window,
        softcap=softcap,
        return_lse=lse,
        splits=splits,
        backend=backend,
        target=target,
        **given,
      )

    return attend

  def gathered(q, pages, table, _):
    """All pages of a sequence copied side by side, then jax's own attention."""
    whole = lambda x: jnp.swapaxes(x[table], 2, 3).reshape(B, count * page_size, K, H)[:, :length]  # noqa: E731
    scaled = lambda x, s: x if s is None else (x * s[..., None]).astype(jnp.bfloat16)  # noqa: E731
    k, v = whole(scaled(pages.keys, pages.key_scales)), whole(scaled(pages.values, pages.value_scales))
    out = jax.nn.dot_product_attention(q.reshape(B, new, N, H), k, v, is_causal=False)
    return out.reshape(B * new, N, H)

  def oracle(inputs, result):
    """Head 0 of the first sequence's last new token, and of the last sequence's: either may prefill or decode."""
    q, pages, table, given = inputs
    ends = np.cumsum(news)
    parts = []
    for b in (0, B - 1):
      keys, values = (float64(x[table[b], 0]).reshape(-1, H)[:length] for x in (pages.keys, pages.values))
      if pages.key_scales is not None:
        scales = (float64(s[table[b], 0]).reshape(-1, 1)[:length] for s in (pages.key_scales, pages.value_scales))
        keys, values = (x * s for x, s in zip((keys, values), scales))
      t, distance = int(ends[b]) - 1, length - 1 - np.arange(length)
      scores = keys @ float64(q[t, 0]) * H**-0.5
      scores = softcap * np.tanh(scores / softcap) if softcap else scores
      scores = scores - (slopes[0] * distance if alibi else 0)
      scores[distance >= (window or length)] = -np.inf
      sink = float(given["sinks"][0]) if sinks else -np.inf
      top = max(scores.max(), sink)
      p = np.exp(scores - top)
      total = p.sum() + np.exp(sink - top)
      out = result[0] if lse else result
      parts.append((out[t, 0], p / total @ values))
      if lse:
        parts.append((result[1][t, 0], np.asarray(top + np.log(total))))
    return joined(*parts)

  name = (
    f"B{B} of {length}, {new} new{f' in {prefills}' if prefills else ''}, N{N} K{K} H{H} pages of {page_size} {dtype}"
  )
  for what, value in (("window", window), ("softcap", softcap), ("splits", splits)):
    name += f" {what} {value:g}" if value else ""
  name += "".join(f" {what}" for what, asked in (("alibi", alibi), ("sinks", sinks), ("lse", lse)) if asked)
  name += "" if query_dtype == jnp.bfloat16 else f" queries {jnp.dtype(query_dtype).name}"
  stored = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(pages))
  seen = min(length, window or length)
  simple = not (alibi or sinks or lse or splits)
  others = {"gathered, jax.nn": gathered} if decoding and simple and not (window or softcap) else {}
  if simple and pages.key_scales is None:
    others |= peers.paged_attention(window=window, softcap=softcap)
  return Case(
    op="paged_attention",
    name=name,
    inputs=(query, pages, table, jax.eval_shape(lambda: arrays(np.random.default_rng(0)))),
    ours=ours,
    others=others,
    oracle=oracle,
    flops=4 * N * H * float(sum(n * min(seen, length - (n - 1) / 2) for n in news)),
    bytes=stored * seen / length + 2 * query.size * 2,
    backends=("mosaic_gpu", "pallas_tpu", "xla"),
    make=make,
  )


def cases(family: str) -> list[Case]:
  options = [
    {"window": 1024},
    {"softcap": 50.0},
    {"alibi": True},
    {"sinks": True},
    {"lse": True},
  ]
  if family == "cpu":
    small = functools.partial(paged_attention, 8, 1024, 8, 4, 64)
    return [*tagged("target", small()), *tagged("option", small(new=64), *(small(**o) for o in options))]
  model = functools.partial(paged_attention, B=64, length=8192, N=32, K=8, H=128)
  if family == "tpu":  # int8 pages there hold at least 128 tokens
    model = functools.partial(model, page_size=128)
  int8 = {"dtype": "int8"}
  return [
    *tagged("target", model(), model(**int8)),
    *tagged("shape", *(model(B=1, **d) for d in ({}, int8))),
    *tagged("shape", model(B=8, new=512), model(B=8, new=512, **int8)),
    *tagged("option", *(model(**o) for o in options), model(splits=4), model(sinks=True, window=1024, **int8)),
    *tagged("option", model(B=32, new=512, prefills=4), model(B=32, new=512, prefills=4, window=1024)),
    *tagged("option", *(model(H=H) for H in (64, 256)), model(K=1), model(K=32), model(B=8, new=512, H=256)),
    *tagged("option", model(page_size=16), model(page_size=256)),
    *tagged("option", model(dtype="float16", query_dtype=jnp.float16), model(dtype="float8_e4m3fn")),
  ]

"""Paged attention in float64 numpy, written from the definition; and calls to try it on, with poison in every slot
that no token was written to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels import KVPages


def oracle(call, *, scale=None, window=None, softcap=None, sinks=None, alibi_slopes=None):
  """out [T, N, H] and lse [T, N]: for every token, gather its sequence's pages, score, softmax, sum."""
  query = np.asarray(call.query, np.float64)
  T, N, H = query.shape
  keys, values = call.dense()
  K = keys.shape[1]
  scale = H**-0.5 if scale is None else scale
  out, lse = np.zeros((T, N, H)), np.full((T, N), -np.inf)
  starts = np.arange(len(call.lengths) + 1) if call.starts is None else np.asarray(call.starts)
  for b in range(len(call.lengths) if call.num_sequences is None else call.num_sequences):
    length, news = int(call.lengths[b]), int(starts[b + 1] - starts[b])
    if length == 0:
      continue
    rows = [(int(call.table[b, s // call.page_size]), s % call.page_size) for s in range(length)]
    k = np.stack([keys[page, :, slot] for page, slot in rows])  # [S, K, H]
    v = np.stack([values[page, :, slot] for page, slot in rows])
    for i in range(news):
      at = length - news + i
      s = np.arange(max(0, at - window + 1) if window else 0, at + 1)
      for n in range(N):
        score = scale * k[s, n // (N // K)] @ query[starts[b] + i, n]
        if softcap is not None:
          score = softcap * np.tanh(score / softcap)
        if alibi_slopes is not None:
          score = score - float(alibi_slopes[n]) * (at - s)
        every = score if sinks is None else np.append(score, float(sinks[n]))
        total = np.log(np.exp(every - every.max()).sum()) + every.max()
        lse[starts[b] + i, n] = total
        out[starts[b] + i, n] = np.exp(score - total) @ v[s, n // (N // K)]
  return out, lse


@dataclasses.dataclass
class Call:
  query: jnp.ndarray
  pages: KVPages
  table: np.ndarray
  lengths: np.ndarray
  starts: np.ndarray | None
  num_sequences: int | None
  page_size: int
  plain: KVPages  # the same pages, [pages, K, page_size, H]

  @property
  def arguments(self):
    """Positional arguments of `paged_attention`."""
    array = lambda x: None if x is None else jnp.asarray(x, jnp.int32)  # noqa: E731
    return (
      self.query, self.pages, array(self.table), array(self.lengths), array(self.starts), array(self.num_sequences),
    )  # fmt: skip

  def dense(self):
    """Keys and values [pages, K, page_size, H] in float64, dequantized exactly."""

    def one(x, scales):
      x = np.asarray(x.astype(jnp.float32), np.float64)
      return x if scales is None else x * np.asarray(scales, np.float64)[..., None]

    return one(self.plain.keys, self.plain.key_scales), one(self.plain.values, self.plain.value_scales)


def for_tpu(pages: KVPages) -> KVPages:
  """Plain pages as a TPU keeps them: as many heads as 128 numbers hold in a row, zeros after them."""
  _, K, _, H = pages.keys.shape
  together = min(max(1, 128 // H), K)
  lanes = -(-together * H // 128) * 128

  def laid_out(x):
    rows = np.zeros((x.shape[0], -(-K // together), x.shape[2], lanes), x.dtype)
    for k in range(K):
      at = k % together * H
      rows[:, k // together, :, at : at + H] = x[:, k]
    return jnp.asarray(rows)

  return KVPages(laid_out(pages.keys), laid_out(pages.values), pages.key_scales, pages.value_scales, heads=(K, H))


def make_call(
  lengths, news=None, *, N=4, K=2, H=64, page_size=16, dtype=jnp.bfloat16, cache=None, seed=0, padding=0, unused=0,
  spare_pages=3, tpu=False,
):  # fmt: skip
  """A call of sequences `lengths` long, `news` tokens of each new (None: decoding).

  padding: tokens of no sequence at the end, NaN. unused: rows of garbage after the sequences in use. Pages are in
  random order, whatever no token was written to is NaN (in quantized pages: the scales are), and entries of the
  table that are out of use point nowhere. tpu: pages are laid out for one.
  """
  rng = np.random.default_rng(seed)
  lengths = np.asarray(lengths)
  B = len(lengths)
  cache = dtype if cache is None else cache
  used = -(-lengths // page_size)
  count = int(used.sum()) + spare_pages
  order = rng.permutation(count)
  table = rng.choice([-7, 1 << 30, 2 * count], (B + unused, max(int(used.max(initial=0)), 1) + 1))
  written = np.zeros((count, page_size), bool)
  for b in range(B):
    table[b, : used[b]], order = order[: used[b]], order[used[b] :]
    for s in range(lengths[b]):
      written[table[b, s // page_size], s % page_size] = True
  shape = (count, K, page_size, H)
  hole = ~written[:, None, :]
  if jnp.dtype(cache) in (jnp.int8, jnp.float8_e4m3fn):
    x = [rng.integers(-127, 128, shape) if cache == jnp.int8 else rng.normal(size=shape) * 40 for _ in range(2)]
    scales = [np.where(hole, np.nan, rng.uniform(0.2, 1.8, shape[:3]) / 64) for _ in range(2)]
    scales = [jnp.asarray(s, jnp.float32) for s in scales]
  else:
    x, scales = [np.where(hole[..., None], np.nan, rng.normal(size=shape)) for _ in range(2)], []
  pages = KVPages(*(jnp.asarray(a, jnp.float32).astype(cache) for a in x), *scales)
  tokens = B + unused if news is None else int(sum(news)) + padding
  query = rng.normal(size=(tokens, N, H))
  starts = None
  if news is not None:
    starts = np.concatenate([[0], np.cumsum(news), rng.integers(-9, 99, unused)])
    query[starts[B] :] = np.nan
  elif unused:
    query[B:] = np.nan
  return Call(
    jnp.asarray(query, dtype), for_tpu(pages) if tpu else pages, table,
    np.append(lengths, rng.integers(0, 99, unused)), starts, B if unused else None, page_size, pages,
  )  # fmt: skip


def check(call, result, **options):
  """Asserts that `result`, (out, lse), is the oracle's, as closely as 16 bits allow; zeros where nothing is due."""
  out, lse = (np.asarray(x.astype(jnp.float32), np.float64) for x in result)
  expected, expected_lse = oracle(call, **options)
  exact = call.query.dtype == jnp.float32
  np.testing.assert_allclose(out, expected, atol=2e-5 if exact else 2e-2, rtol=1e-4 if exact else 2e-2)
  np.testing.assert_allclose(lse, expected_lse, atol=2e-5 if exact else 4e-3, rtol=1e-5 if exact else 1e-3)
  assert not out[np.isneginf(expected_lse)].any()


def model_shapes(
  *, sequences=64, length=8192, tokens=None, page_size=64, cache="bfloat16", N=32, K=8, H=128, target=None
):
  """Abstract positional arguments at the size of a real model (Llama 3 8B); `tokens` None: decoding."""
  shape = jax.ShapeDtypeStruct
  ints = lambda *s: shape(s, jnp.int32)  # noqa: E731
  pages = jax.eval_shape(lambda: KVPages.zeros(sequences * length // page_size, page_size, K, H, cache, target=target))
  arguments = shape((tokens or sequences, N, H), jnp.bfloat16), pages, ints(sequences, length // page_size)
  return *arguments, ints(sequences), *(() if tokens is None else (ints(sequences + 1),))

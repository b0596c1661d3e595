"""`paged_attention`: new tokens of many sequences against a cache in pages; named backends."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import dispatch
from jaxllm.kernels.paged import schedule
from jaxllm.kernels.paged.options import Options
from jaxllm.kernels.paged.pages import KVPages

# By the backend's `tile_shape(group, decoding)`, the tokens and rows of its tiles, and
# `forward(call, queries [M, K, R, H], pages, page_table, schedule, options)`: float32 results [P, M, K, R, H] and
# log-sum-exp [P, M, K, R] of the P parts of every tile. The call's options are `splits`.
OP = dispatch.Op("paged")


def paged_attention(
  query: Float[Array, "T N H"],
  pages: KVPages,
  page_table: Int[Array, "B max_pages"],
  kv_lengths: Int[Array, " B"],
  query_starts: Int[Array, " B+1"] | None = None,
  num_sequences: Int[Array, ""] | int | None = None,
  *,
  scale: float | None = None,
  window: int | None = None,
  softcap: float | None = None,
  sinks: Float[Array, " N"] | None = None,
  alibi_slopes: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  splits: int | None = None,
  backend: str | None = None,
  target: str | None = None,
) -> Float[Array, "T N H"] | tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
  """Causal attention of each sequence's newest tokens to all its tokens, whose keys and values lie in pages.

  One call decodes (one new token a sequence), prefills (many), or does both for different sequences, whose tokens
  stand back to back in `query`. The new tokens' keys and values are in the pages already (`write_pages`). Token i of
  n new ones sits at position kv_length - n + i and sees positions up to its own. Query head n reads key head n // G.
  The softmax runs in float32. Tokens of no sequence give zeros. Slots that no token was written to may hold anything,
  NaN included. There is no derivative: training calls `flash_attention`.

  PagedAttention: arXiv 2309.06180. Ragged batches: arXiv 2604.15464. Parts of a long sequence computed side by side
  and combined by their log-sum-exp: Flash-Decoding (crfm.stanford.edu/2023/10/12/flashdecoding.html).

  Args:
    page_table: pages of each sequence in order, page p holding positions p * page_size and on. Entries past a
      sequence's length are not read.
    kv_lengths: tokens of each sequence, new ones included; 0 for none.
    query_starts: sequence b's new tokens are query[query_starts[b]:query_starts[b + 1]]. None: decoding, T = B, token
      b is sequence b's. Say so when it holds: tiles are made for it.
    num_sequences: rows of page_table, kv_lengths and query_starts after so many are not read. None: all B count.
    scale: of the scores, H ** -0.5 by default.
    window: so many keys up to and including its own are seen by a token; pages before are not loaded.
    softcap: scores become softcap * tanh(scores / softcap).
    sinks: a logit per head that joins the softmax and carries no value (gpt-oss, arXiv 2508.10925).
    alibi_slopes: scores lose slope * distance (arXiv 2108.12409).
    return_lse: also the logarithm of the sum of the exponentials of the scores, in nats and float32, sink included;
      -inf for tokens of no sequence.
    splits: into how many parts a sequence's keys are cut, computed side by side; chosen by shape if None. "xla"
      computes one part only and ignores it; on TPU more than one part helps only two cores of one device.
    backend, target: as in `backends.choose`.

  Raises:
    ConfigError: shapes that do not belong together, a backend that cannot compute what is asked, or a derivative.
  """
  pages.check()
  T, N, H = query.shape
  K = pages.num_kv_heads
  if N % K or pages.head_dim != H:
    raise ConfigError(
      f"paged_attention takes query [T, N, H] and pages of K heads of H, with N a multiple of K; these are "
      f"{query.shape} and pages of {K} heads of {pages.head_dim}"
    )
  B = page_table.shape[0]
  given = None if query_starts is None else query_starts.shape[0]
  if kv_lengths.shape != (B,) or given not in (None, B + 1) or (given is None and T != B):
    raise ConfigError(
      f"paged_attention of {B} rows in page_table takes kv_lengths [{B}] and query_starts [{B + 1}], or no "
      f"query_starts and {B} queries; these are {kv_lengths.shape}, {given}, {T} queries"
    )
  if window is not None and window < 1 or splits is not None and splits < 1:
    raise ConfigError(f"window and splits are at least 1; these are {window}, {splits}")
  options = Options(float(H**-0.5 if scale is None else scale), N // K, window, softcap, alibi_slopes)
  call = dispatch.choose("paged_attention", OP, backend, target, splits, query, pages, options)

  @jax.custom_jvp
  def compute(query, pages, sinks, options, page_table, kv_lengths, query_starts, num_sequences):
    capacity = page_table.shape[1] * pages.page_size
    plan = functools.partial(schedule.plan, T, capacity=capacity, kv_lengths=kv_lengths, query_starts=query_starts)
    table = jnp.clip(page_table.astype(jnp.int32), 0, pages.keys.shape[0] - 1)  # entries out of use may be anything
    shape = call.module.tile_shape(N // K, query_starts is None)
    work = plan(tile_tokens=shape.tokens, num_sequences=num_sequences)
    out, lse = dispatch.run(call, schedule.to_tiles(query, work, K, shape.rows), pages, table, work, options)
    return schedule.from_tiles(out, lse, work, N, sinks, query.dtype)

  @compute.defjvp
  def _(primals, tangents):
    raise ConfigError("paged_attention has no derivative: train with flash_attention")

  out, lse = compute(query, pages, sinks, options, page_table, kv_lengths, query_starts, num_sequences)
  return (out, lse) if return_lse else out

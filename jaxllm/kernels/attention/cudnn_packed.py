"""cuDNN's fused attention in its packed layout: rows of several segments without a mask.

The kernel takes the start and the length of each segment. jax has this behind a private function only, and its own test
runs it without causal order and without grouped heads, so "auto" waits for a measurement here (`backends.UNPROVEN`).

A row may have `most_segments` of them, because cuDNN's statistics take [B * segments, N, T] whatever the rows hold.
Which rows have more is known when the program runs: then the "xla" form computes the call, slower and right.
"""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from jaxtyping import Array, Bool, Float, Int

from jaxllm.kernels.attention import cudnn, reference
from jaxllm.kernels.attention.options import Options


def most_segments(length: int) -> int:
  """Segments of a row that the layout has room for; packed documents have hundreds of tokens on average."""
  return min(64, max(8, length // 128))


def refuses(call, query, key, value, options: Options) -> str | None:
  """Why this layout cannot compute the call, or None; by shapes and dtypes only."""
  if "segment_ids" not in options.asked:
    return "only for segments"
  if "window" in options.asked:
    return "no window"
  if query.size >= 2**31:
    return f"offsets of 32 bits, too few for {query.size:,} numbers"
  return cudnn.refuses(call, query, key, value, options)


def forward(call, query, key, value, options: Options) -> tuple[Float[Array, "B T N H"], None]:
  """Attention within segments in 16 bits, without log-sum-exp."""

  def packed(query, key, value, options, offsets, lengths):
    out = fused.dot_product_attention(
      query,
      key,
      value,
      q_seqlen=lengths,
      kv_seqlen=lengths,
      q_offsets=offsets,
      kv_offsets=offsets,
      scale=options.scale,
      mask_type=fused.MaskType.PADDING_CAUSAL if options.visibility.causal else fused.MaskType.PADDING,
    )
    return jnp.where(options.query_segments[:, :, None, None] != 0, out, 0)  # padding is not written

  def anyhow(query, key, value, options, offsets, lengths):
    return reference.forward(call, query, key, value, options)[0].astype(query.dtype)

  @cudnn.keep_results
  def attend(query, key, value, options):
    offsets, lengths, fits = layout(options.query_segments, most_segments(query.shape[1]))
    fits &= (options.query_segments == options.key_segments).all()
    return jax.lax.cond(fits, packed, anyhow, query, key, value, options, offsets, lengths)

  return attend(query, key, value, options), None


def layout(segments: Int[Array, "B T"], most: int) -> tuple[Int[Array, "B M+1"], Int[Array, "B M"], Bool[Array, ""]]:
  """Where each row's segments start, how long they are (-1: no more), and whether that says it all.

  It does where each segment is one run of tokens, ids rise along the row, and no row has more than `most` (M).
  """
  B, T = segments.shape
  before = jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
  starts = (segments != before) & (segments != 0)
  number = jnp.cumsum(starts, axis=1) - 1
  row, token = jnp.arange(B)[:, None], jnp.arange(T, dtype=jnp.int32)[None]
  nowhere = most + 1
  offsets = jnp.full((B, most + 1), -1, jnp.int32)
  offsets = offsets.at[row, jnp.where(starts, number, nowhere)].set(jnp.broadcast_to(token, (B, T)), mode="drop")
  lengths = jnp.zeros((B, most), jnp.int32)
  lengths = lengths.at[row, jnp.where(segments != 0, number, nowhere)].add(1, mode="drop")
  rising = (~starts | (segments > jax.lax.cummax(before, axis=1))).all()
  return offsets, jnp.where(lengths > 0, lengths, -1), rising & (number[:, -1] < most).all()

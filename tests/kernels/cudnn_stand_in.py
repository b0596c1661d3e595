"""cuDNN's attention on a machine without it: lowered as if there were a Hopper GPU, or computed in XLA's arithmetic."""

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused


def allow_lowering(monkeypatch):
  """jax asks the library and the device before it traces; here both answer as on an H100."""
  monkeypatch.setattr(fused, "check_cudnn_version", lambda: 92000)
  monkeypatch.setattr(fused, "check_compute_capability", lambda least: float(least) <= 9.0)
  monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda version: version == "9.0")


def compute_masked(monkeypatch):
  """`jax.nn.dot_product_attention` without cuDNN, refusing what cuDNN's form refuses; the arguments of the calls."""
  calls, real = [], jax.nn.dot_product_attention

  def stand_in(query, key, value, *, implementation, local_window_size=None, is_causal, **options):
    assert implementation == "cudnn" and query.dtype.itemsize == 2
    assert local_window_size is None or (local_window_size[1] == 0 and is_causal), "no right window in cuDNN"
    calls.append(dict(options, local_window_size=local_window_size, is_causal=is_causal))
    return real(query, key, value, is_causal=is_causal, local_window_size=local_window_size, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  return calls


def compute_packed(monkeypatch):
  """The packed layout as the kernel reads it: a list of starts, counted in numbers from the first row's, and lengths.

  What no segment covers is not written: NaN. Returns the list of calls, filled as they are traced.
  """
  calls = []

  def stand_in(query, key, value, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    calls.append(mask_type)
    B, T, N, H = query.shape
    K = key.shape[2]
    lengths, key_lengths, starts, key_starts = fused._fix_seqlen_offsets(
      q_seqlen, kv_seqlen, q_offsets, kv_offsets, query, key
    )
    of_query, of_key = (
      _segment(B * T, first.reshape(-1) // size, length.reshape(-1))
      for first, size, length in ((starts, N * H, lengths), (key_starts, K * H, key_lengths))
    )
    tokens = jnp.arange(B * T)
    seen = (of_query[:, None] == of_key) & (of_query[:, None] >= 0)
    if mask_type == fused.MaskType.PADDING_CAUSAL:
      seen &= tokens <= tokens[:, None]
    flat = lambda x: jnp.repeat(x, N // x.shape[2], axis=2).reshape(B * T, N, H).astype(jnp.float32)  # noqa: E731
    scores = jnp.where(seen, scale * jnp.einsum("tnh,snh->nts", flat(query), flat(key)), -1e30)
    out = jnp.einsum("nts,snh->tnh", jax.nn.softmax(scores), flat(value))
    return jnp.where((of_query >= 0)[:, None, None], out, jnp.nan).reshape(query.shape).astype(query.dtype)

  monkeypatch.setattr(fused, "dot_product_attention", stand_in)
  return calls


def _segment(tokens, starts, lengths):
  """The number of the segment that covers each token, or -1."""
  at = jnp.arange(tokens)[:, None]
  first = starts[: lengths.size]
  inside = (at >= first) & (at < first + lengths)
  return jnp.where(inside.any(1), inside.argmax(1), -1)

"""Machine code for an H100: what the kernels' has to be like, and the attention calls that are compiled for it."""

import importlib.util

import jax
import jax.numpy as jnp
import machine_code
import pytest

from jaxllm.kernels import Visibility

can_compile = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda13_plugin") is None
  or machine_code.find_tool("ptxas") is None
  or machine_code.find_tool("nvdisasm") is None,
  reason="machine code needs jax's CUDA plugin, ptxas and nvdisasm",
)


def check_machine_code(function, avals, kernels=1):
  """Compiles a call of so many kernels: they use the tensor core and the copy engine, keep everything in registers,
  and no product waits for the one before it. Returns the compiled call."""
  program, found = machine_code.compile_gpu(function, avals)
  assert len(found) == kernels
  for code in found:
    assert code.tensor_core > 0 and code.tma > 0
    assert code.spill_bytes == 0 and code.local == 0 and not code.serialized, code
    assert code.shared_bytes <= machine_code.SHARED_MEMORY_LIMIT
  return program


SEGMENTED = ("query_segments", "key_segments")
PLACED = ("query_offset", "prefix_lengths", "alibi_slopes", "sinks")
EVERYTHING = dict(
  B=2, T=4096, N=32, K=8, softcap=30.0, visibility=Visibility(window=1024, sink_tokens=4),
  arrays=(*SEGMENTED, "key_positions", *PLACED),
)  # fmt: skip
BOTH_WAYS = EVERYTHING | dict(visibility=Visibility(causal=False, window=1024, sink_tokens=4))
ATTENTION = {
  "llama": dict(B=1, T=4096, N=32, K=8, H=128),
  "everything-128": EVERYTHING | dict(H=128),
  "everything-256": EVERYTHING | dict(H=256),
}
MORE_ATTENTION = {
  "gemma": dict(B=1, T=4096, N=16, K=8, H=256, softcap=50.0),
  "packed-window": dict(B=2, T=4096, N=32, K=8, H=128, visibility=Visibility(window=1024), arrays=SEGMENTED),
  "bidirectional": dict(B=1, T=4096, N=16, K=16, H=64, visibility=Visibility(causal=False)),
  "bidirectional-128": dict(B=1, T=4096, N=16, K=16, H=128, visibility=Visibility(causal=False)),
  "h64": dict(B=1, T=4096, N=32, K=8, H=64),
  "h192": dict(B=1, T=4096, N=16, K=16, H=192),
  "ragged": dict(B=2, T=4001, N=32, K=8, H=128),
  "alibi": dict(B=1, T=4096, N=32, K=32, H=128, arrays=("alibi_slopes",)),
  "capped": dict(B=1, T=4096, N=32, K=8, H=128, softcap=30.0),
  "gpt-oss": dict(B=1, T=4096, N=64, K=8, H=64, visibility=Visibility(window=128), arrays=(*SEGMENTED, "sinks")),
  "cached": dict(
    B=4, T=512, N=32, K=8, H=128, visibility=Visibility(window=1000), arrays=("query_offset", "prefix_lengths")
  ),
  "sink-tokens": dict(
    B=2, T=4096, N=32, K=8, H=128, visibility=Visibility(window=1024, sink_tokens=4),
    arrays=(*SEGMENTED, "key_positions"),
  ),
  "everything-64": EVERYTHING | dict(H=64),
  "everything-192": EVERYTHING | dict(H=192),
  "without-positions-128": EVERYTHING | dict(H=128, arrays=(*SEGMENTED, *PLACED)),
  "without-positions-256": EVERYTHING | dict(H=256, arrays=(*SEGMENTED, *PLACED)),
  "both-ways-192": BOTH_WAYS | dict(H=192),
  "both-ways-256": BOTH_WAYS | dict(H=256),
}  # fmt: skip


def attention_shapes(B, T, N, K, H, arrays=()):
  """(query, key, the arrays of `Options` by name) of a call."""
  shape = jax.ShapeDtypeStruct
  shapes = dict.fromkeys(("query_segments", "key_segments", "key_positions"), shape((B, T), jnp.int32))
  shapes |= dict.fromkeys(("query_offset", "prefix_lengths"), shape((B,), jnp.int32))
  shapes |= dict.fromkeys(("alibi_slopes", "sinks"), shape((N,), jnp.float32))
  query, key = (shape((B, T, heads, H), jnp.bfloat16) for heads in (N, K))
  return query, key, {name: shapes[name] for name in arrays}

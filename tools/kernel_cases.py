"""The kernels at the shapes that models have: what tools/bench_kernels.py times and tools/machine_code.py compiles.

A case knows its inputs, its floating-point operations and bytes, how our function is called with a backend's name, who
else computes the same, and the answer in float64 for a part of it.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import kernels

SDS = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Case:
  """One kernel at one shape."""

  op: str
  name: str
  inputs: tuple[Any, ...]  # pytrees of ShapeDtypeStructs
  ours: Callable[[str, str], Callable]  # (backend, target) -> function of the inputs
  others: dict[str, Callable] = dataclasses.field(default_factory=dict)  # peer -> function of the same inputs
  oracle: Callable | None = None  # (inputs, result) -> (part of the result, the same in float64), numpy
  flops: float = 0.0
  bytes: float = 0.0  # that must move at least
  backends: tuple[str, ...] = ("mosaic_gpu", "pallas_tpu", "cudnn", "cpu", "xla")
  make: Callable[[np.random.Generator], tuple] | None = None  # inputs that are more than random numbers
  torch: Callable | None = None  # the same function of torch tensors

  @property
  def dtype(self) -> str:
    """Of the first input."""
    return jnp.dtype(jax.tree.leaves(self.inputs)[0].dtype).name

  def values(self, seed: int = 0) -> tuple:
    """Random inputs: zeros would run faster than real data."""
    rng = np.random.default_rng(seed)
    if self.make is not None:
      return self.make(rng)
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, dtype=np.float32)).astype(s.dtype)  # noqa: E731
    return jax.tree.map(draw, self.inputs)


def installed(name: str) -> bool:
  """Whether a peer's package can be imported."""
  return importlib.util.find_spec(name) is not None


# ---------------------------------------------------------------- attention


def attention(B, T, N, K, H, *, dtype=jnp.bfloat16, causal=True, backward=False, S=None, **options) -> Case:
  """Attention forward, or the gradients of all three inputs (which computes the forward pass again)."""
  S = S or T
  q, k = SDS((B, T, N, H), dtype), SDS((B, S, K, H), dtype)
  visibility = kernels.Visibility(causal=causal, window=options.pop("window", None))
  segments = options.pop("segments", False)

  def call(attend):
    if not backward:
      return attend
    return lambda q, k, v, d_out: jax.vjp(attend, q, k, v)[1](d_out)

  def ours(backend, target):
    def attend(q, k, v):
      extra = dict(options)
      if segments:
        ids = jnp.broadcast_to(1 + jnp.arange(T) // (T // segments), (B, T))
        extra["segment_ids"] = (ids, ids)
      return kernels.flash_attention(q, k, v, visibility=visibility, backend=backend, target=target, **extra)

    return call(attend)

  others: dict[str, Callable] = {}
  if not options and not segments and visibility.window is None:
    for name in ("cudnn", "xla"):
      attend = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=name)
      others[f"jax.nn {name}"] = call(attend)
    if installed("tokamax"):
      others["tokamax"] = call(_tokamax_attention(causal))
    if dtype == jnp.float16 and not (causal and backward):  # its buffers are float16 whatever goes in
      others["jax FA3"] = call(_mosaic_attention(causal))
    others["jax splash"] = call(_splash(N, T, S, causal, H))

  def oracle(inputs, result):
    q, k, v = (np.asarray(x[:1], np.float64) for x in inputs)
    rows = slice(T - 64, T)  # the last queries see the most
    scores = q[0, rows, 0] @ k[0, :, 0].T * H**-0.5
    if causal:
      scores[np.arange(T - 64, T)[:, None] + (S - T) < np.arange(S)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(result[0, rows, 0], np.float64), p / p.sum(-1, keepdims=True) @ v[0, :, 0]

  pairs = B * N * T * S * (0.5 if causal and S == T else 1.0)
  name = f"B{B} T{T}{f' S{S}' if S != T else ''} N{N} K{K} H{H} {'causal' if causal else 'full'}"
  name += "".join(f" {key}" for key in options) + (f" {segments} segments" if segments else "")
  name += f" window {visibility.window}" if visibility.window else ""
  plain = not options and not segments and visibility.window is None
  return Case(
    op="attention backward" if backward else "attention",
    name=f"{name} {jnp.dtype(dtype).name}",
    inputs=(q, k, k, q) if backward else (q, k, k),
    ours=ours,
    others=others,
    oracle=oracle if plain and not backward else None,
    flops=pairs * H * 4 * (3.5 if backward else 1.0),
    bytes=2 * (q.size + k.size) * jnp.dtype(dtype).itemsize * (2 if backward else 1),
    torch=functools.partial(_torch_attention, causal) if plain and not backward and S == T else None,
  )


def _tokamax_attention(causal):
  def attend(q, k, v):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, is_causal=causal)

  return attend


def _mosaic_attention(causal):
  def attend(q, k, v):
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=causal)
    return attention_mgpu.attention(q, k, v, config)

  return attend


def _splash(N, T, S, causal, H):
  def attend(q, k, v):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    mask = splash_attention_mask.CausalMask((T, S)) if causal else splash_attention_mask.FullMask((T, S))
    size = splash_attention_kernel.BlockSizes(
      **{name: min(512, T) for name in ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")},
      **{name: min(512, T) for name in ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")},
    )
    K = k.shape[2]
    make = splash_attention_kernel.make_splash_mqa_single_device
    kernel = make(splash_attention_mask.MultiHeadMask([mask] * (N // K)), block_sizes=size)
    q = (q * H**-0.5).reshape(*q.shape[:2], K, N // K, H).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    out = jax.vmap(jax.vmap(kernel))(q, k, v)  # [B, K, G, T, H]
    return out.transpose(0, 3, 1, 2, 4).reshape(out.shape[0], T, N, H)

  return attend


def _torch_attention(causal, q, k, v):
  import torch

  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


# ---------------------------------------------------------------- cross-entropy


def cross_entropy(M, D, V, *, dtype=jnp.bfloat16, backward=True, **options) -> Case:
  """The head and the loss of M tokens, with the gradients of both inputs unless told otherwise."""
  inputs = (SDS((1, M, D), dtype), SDS((D, V), dtype), SDS((1, M), jnp.int32))

  def make(rng):
    x, head = (rng.standard_normal(s.shape, dtype=np.float32) for s in inputs[:2])
    targets = jnp.asarray(rng.integers(0, V, (1, M)), jnp.int32)
    return jnp.asarray(x, dtype), jnp.asarray(head * D**-0.5, dtype), targets

  def call(loss):
    return (lambda x, head, t: jax.value_and_grad(loss, (0, 1))(x, head, t)) if backward else loss

  def ours(backend, target):
    def loss(x, head, targets):
      weights = jnp.ones(targets.shape, jnp.float32)
      return kernels.cross_entropy(x, head, targets, weights, backend=backend, target=target, **options).loss_sum

    return call(loss)

  def whole(x, head, targets):
    logits = jnp.einsum("BTD,DV->BTV", x, head, preferred_element_type=jnp.float32)
    at = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - at).sum()

  others = {"all logits": call(whole)}
  if installed("tokamax"):
    others["tokamax"] = call(_tokamax_cross_entropy)

  def oracle(inputs, result):
    if M * V > 1 << 27:  # a float64 product of this size takes minutes
      return None
    x, head, targets = (np.asarray(a, np.float64 if i < 2 else None) for i, a in enumerate(inputs))
    logits = x[0] @ head
    top = logits.max(-1)
    want = (top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(M), targets[0]]).sum()
    return np.asarray(result[0] if backward else result, np.float64), want

  return Case(
    op="cross_entropy",
    name=f"M{M} D{D} V{V} {'loss and gradients' if backward else 'loss'} {jnp.dtype(dtype).name}",
    inputs=inputs,
    ours=ours,
    others=others,
    oracle=oracle,
    flops=2 * M * D * V * (3 if backward else 1),
    bytes=(M * D + D * V) * jnp.dtype(dtype).itemsize * (2 if backward else 1),
    backends=("mosaic_gpu", "pallas_tpu", "cpu", "xla"),
    make=make,
  )


def _tokamax_cross_entropy(x, head, targets):
  import tokamax

  return tokamax.linear_softmax_cross_entropy_loss(x[0], targets[0], head, reduction="sum")


# ---------------------------------------------------------------- quantized matmul


def quantized_matmul(M, D, F, format, *, group_size=None, dtype=jnp.bfloat16, backward=False) -> Case:
  """Activations times a quantized weight; the bar is the dense product, whose weight is 2 to 4 times as large."""
  x, dense = SDS((M, D), dtype), SDS((D, F), dtype)
  quantize = functools.partial(kernels.quantize, format=format, group_size=group_size)
  weight = jax.eval_shape(quantize, SDS((D, F), jnp.float32))
  dy = SDS((M, F), dtype)

  def make(rng):
    w = jnp.asarray(rng.standard_normal((D, F), dtype=np.float32) * D**-0.5)
    rows = jnp.asarray(rng.standard_normal((M, F if backward else D), dtype=np.float32), dtype)
    return rows, quantize(w), w.astype(dtype)

  def ours(backend, target):
    multiply = functools.partial(kernels.quantized_matmul, backend=backend, target=target)
    if backward:  # of a linear function, at any point
      return lambda dy, weight, _: jax.vjp(lambda x: multiply(x, weight), jnp.zeros((M, D), dtype))[1](dy)[0]
    return lambda x, weight, _: multiply(x, weight)

  def oracle(inputs, result):
    rows, weight, _ = inputs
    w = np.asarray(kernels.dequantize(weight), np.float64)
    part = slice(0, 64)
    if backward:
      return np.asarray(result[part], np.float64), np.asarray(rows[part], np.float64) @ w.T
    return np.asarray(result[part], np.float64), np.asarray(rows[part], np.float64) @ w

  stored = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(weight))
  return Case(
    op="quantized_matmul",
    name=f"M{M} {D}x{F} {format}{f' g{group_size}' if group_size else ''}{' dx' if backward else ''}",
    inputs=(dy if backward else x, weight, dense),
    ours=ours,
    others={f"dense {jnp.dtype(dtype).name}": lambda x, _, w: x @ (w.T if backward else w)},
    oracle=oracle,
    flops=2 * M * D * F,
    bytes=stored + (x.size + dy.size) * jnp.dtype(dtype).itemsize,
    backends=("mosaic_gpu", "pallas_tpu", "cpu", "xla"),
    make=make,
  )


# ---------------------------------------------------------------- paged attention


def paged_attention(B, length, N, K, H, *, page_size=64, new=1, dtype="bfloat16") -> Case:
  """`new` tokens of each of B sequences that hold `length` tokens, in pages that lie anywhere."""
  count = -(-length // page_size)
  pages = jax.eval_shape(functools.partial(kernels.KVPages.zeros, B * count, page_size, K, H, dtype))
  query, table = SDS((B * new, N, H), jnp.bfloat16), SDS((B, count), jnp.int32)

  def make(rng):
    def draw(x):
      values = rng.standard_normal(x.shape, dtype=np.float32)
      if x.dtype == jnp.int8:
        return jnp.asarray(jnp.clip(40 * values, -127, 127), jnp.int8)
      return jnp.asarray(jnp.abs(values) / 40 if x.dtype == jnp.float32 else values, x.dtype)

    places = jnp.asarray(rng.permutation(B * count).reshape(B, count), jnp.int32)
    return draw(query), jax.tree.map(draw, pages), places

  def ours(backend, target):
    def attend(q, pages, table):
      lengths, starts = jnp.full(B, length, jnp.int32), jnp.arange(B + 1, dtype=jnp.int32) * new
      return kernels.paged_attention(
        q, pages, table, lengths, None if new == 1 else starts, backend=backend, target=target
      )

    return attend

  def gathered(q, pages, table):
    """All pages of a sequence copied side by side, then jax's own attention."""
    whole = lambda x: jnp.swapaxes(x[table], 2, 3).reshape(B, count * page_size, K, H)[:, :length]  # noqa: E731
    scaled = lambda x, s: x if s is None else (x * s[..., None]).astype(jnp.bfloat16)  # noqa: E731
    k, v = whole(scaled(pages.keys, pages.key_scales)), whole(scaled(pages.values, pages.value_scales))
    out = jax.nn.dot_product_attention(q.reshape(B, new, N, H), k, v, is_causal=False)
    return out.reshape(B * new, N, H)

  def oracle(inputs, result):
    q, pages, table = inputs
    keys, values = (np.asarray(x[table[0], 0], np.float64).reshape(-1, H)[:length] for x in (pages.keys, pages.values))
    if pages.key_scales is not None:
      scales = (
        np.asarray(s[table[0], 0], np.float64).reshape(-1, 1)[:length] for s in (pages.key_scales, pages.value_scales)
      )
      keys, values = (x * s for x, s in zip((keys, values), scales))
    scores = keys @ np.asarray(q[new - 1, 0], np.float64) * H**-0.5  # the last new token sees all
    p = np.exp(scores - scores.max())
    return np.asarray(result[new - 1, 0], np.float64), p / p.sum() @ values

  stored = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(pages))
  return Case(
    op="paged_attention",
    name=f"B{B} of {length}, {new} new, N{N} K{K} H{H} pages of {page_size} {dtype}",
    inputs=(query, pages, table),
    ours=ours,
    others={"gathered, jax.nn": gathered} if new == 1 else {},
    oracle=oracle,
    flops=4 * B * new * length * N * H,
    bytes=stored + 2 * query.size * 2,
    backends=("mosaic_gpu", "pallas_tpu", "xla"),
    make=make,
  )


# ---------------------------------------------------------------- grouped matmul


def grouped_matmul(M, E, D, F, *, dtype=jnp.bfloat16, gradient=None) -> Case:
  """M rows sorted by expert times their experts' matrices; `gradient`: "x" or "weights"."""
  x, w, dy, sizes = SDS((M, D), dtype), SDS((E, D, F), dtype), SDS((M, F), dtype), SDS((E,), jnp.int32)

  def make(rng):
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, dtype=np.float32) * D**-0.5, dtype)  # noqa: E731
    shares = rng.dirichlet(np.full(E, 4.0))
    return draw(x), draw(w), draw(dy), jnp.asarray(rng.multinomial(M, shares), jnp.int32)

  def of(multiply):
    def run(x, w, dy, sizes):
      if gradient is None:
        return multiply(x, w, sizes)
      if gradient == "x":
        return jax.vjp(lambda x: multiply(x, w, sizes), x)[1](dy)[0]
      return jax.vjp(lambda w: multiply(x, w, sizes), w)[1](dy)[0]

    return run

  def ours(backend, target):
    return of(functools.partial(kernels.grouped_matmul, backend=backend, target=target))

  def megablox(x, w, sizes):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    return gmm(x, w, sizes, preferred_element_type=dtype, tiling=(min(512, M), min(512, D), min(512, F)))

  def oracle(inputs, result):
    x, w, dy, sizes = inputs
    first = min(int(sizes[0]), 256)
    if gradient == "weights" or not first:
      return None
    a, b = (x, np.asarray(w[0], np.float64)) if gradient is None else (dy, np.asarray(w[0], np.float64).T)
    return np.asarray(result[:first], np.float64), np.asarray(a[:first], np.float64) @ b

  others: dict[str, Callable] = {"jax ragged_dot": of(jax.lax.ragged_dot)}
  others["jax megablox"] = of(megablox)
  return Case(
    op="grouped_matmul",
    name=f"M{M} E{E} {D}x{F} {jnp.dtype(dtype).name}{f' d{gradient}' if gradient else ''}",
    inputs=(x, w, dy, sizes),
    ours=ours,
    others=others,
    oracle=oracle,
    flops=2 * M * D * F,
    bytes=(x.size + dy.size + w.size) * jnp.dtype(dtype).itemsize,
    backends=("mosaic_gpu", "pallas_tpu", "xla"),
    make=make,
  )


# ---------------------------------------------------------------- the table


FORMATS = (("int8", None), ("int4", 128), ("nf4", 64), ("int8_dynamic", None), ("fp8", None), ("fp8_dynamic", None))


def cases(family: str) -> list[Case]:
  """The cases of a family of chips ("cpu", "hopper", "gpu", "tpu")."""
  if family == "cpu":
    return [
      *(attention(4, T, 8, 4, 64, dtype=jnp.float32, backward=b) for T in (256, 1024) for b in (False, True)),
      attention(4, 1024, 8, 4, 64, backward=False),
      attention(4, 1024, 8, 4, 64, dtype=jnp.float32, window=256),
      cross_entropy(2048, 384, 8192, dtype=jnp.float32),
      cross_entropy(2048, 384, 32768, dtype=jnp.float32),
      cross_entropy(2048, 384, 32768),
      *(quantized_matmul(M, 2048, 8192, f, group_size=g, dtype=jnp.float32) for M in (1, 64) for f, g in FORMATS[:4]),
      paged_attention(8, 1024, 8, 4, 64),
      *(grouped_matmul(2048, 8, 384, 1024, dtype=jnp.float32, gradient=g) for g in (None, "x", "weights")),
    ]
  return [
    *(attention(32768 // T, T, 32, 8, 128, backward=b) for b in (False, True) for T in (1024, 4096, 16384)),
    *(attention(8, 4096, 32, 8, H, backward=b) for b in (False, True) for H in (64, 256)),
    attention(8, 4096, 32, 8, 128, causal=False),
    attention(8, 4096, 32, 8, 128, window=1024),
    attention(8, 4096, 32, 8, 128, segments=4),
    attention(8, 4096, 16, 8, 256, softcap=50.0),
    *(cross_entropy(8192, D, V) for D, V in ((2048, 32768), (4096, 128256), (2048, 151936))),
    cross_entropy(8192, 4096, 128256, backward=False),
    *(quantized_matmul(M, 4096, 14336, f, group_size=g) for f, g in FORMATS for M in (1, 16, 256, 4096)),
    *(quantized_matmul(4096, 4096, 14336, f, group_size=g, backward=True) for f, g in FORMATS[:3]),
    *(paged_attention(B, 8192, 32, 8, 128, dtype=d) for d in ("bfloat16", "int8") for B in (1, 64)),
    paged_attention(8, 8192, 32, 8, 128, new=512),
    *(
      grouped_matmul(M, E, D, F, gradient=g)
      for M, E, D, F in ((16384, 8, 4096, 14336), (32768, 128, 2048, 768))
      for g in (None, "x", "weights")
    ),
  ]

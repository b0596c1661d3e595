"""Is every kernel right on the chip at hand? Small calls with every option against float64, for bench_kernels.py.

A check draws inputs for several seeds, compares results and gradients with the definition in numpy (the tests'
oracles), puts NaN wherever a kernel must not look, and asks whether the same call gives the same bits again.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests" / "kernels"))
import attention_oracle
import grouped_oracle
import head_loss_oracle
import paged_oracle
import quantized_oracle

from jaxllm import kernels
from jaxllm.kernels import Visibility

SEEDS, REPEATS = 3, 20
TOLERANCE = 1.5e-2  # of the largest number of an array: 16-bit inputs, results and probabilities


@dataclasses.dataclass(frozen=True)
class Check:
  """One kind of call. quick: among the few that come first when time is short."""

  op: str
  name: str
  function: Callable[[str, str], Callable]  # (backend, target) -> function of the arguments
  draw: Callable[[int], tuple]  # seed -> (arguments, what the oracle needs)
  truth: Callable  # of what the oracle needs
  quick: bool = False

  def outcome(self, backend: str, target: str) -> dict:
    """The largest error as a share of the tolerance, and whether repeated calls agree."""
    from bench_worker import same

    run, worst, again = jax.jit(self.function(backend, target)), 0.0, True
    for seed in range(SEEDS):
      arguments, known = self.draw(seed)
      result = jax.block_until_ready(run(*arguments))
      worst = max(worst, share(result, self.truth(known)))
      again &= all(same(run(*arguments), result) for _ in range(REPEATS if seed == 0 else 1))
    return {"share of tolerance": min(worst, 1e9), "same again": again, "right": worst <= 1 and again}


def share(got, want) -> float:
  """Largest error over what is allowed; infinite where a number is not finite and should be."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rest = np.isfinite(b)
    if a.shape != b.shape or not np.array_equal(a[~rest], b[~rest]) or not np.isfinite(a[rest]).all():
      return float("inf")
    if rest.any():
      worst = max(worst, float(np.abs(a[rest] - b[rest]).max() / (TOLERANCE * max(np.abs(b[rest]).max(), 1e-6))))
  return worst


def checks(target: str) -> list[Check]:
  """All of them, the ones that say most first."""
  del target
  found = [*_attention(), *_quantized(), *_paged(), *_head_loss(), *_grouped()]
  return sorted(found, key=lambda check: not check.quick)


# ---------------------------------------------------------------- attention


def attention(
  name, B, T, N, K, H, *, S=None, dtype="bfloat16", visibility=Visibility(), lse=True, quick=False, **options
):
  """Result, log-sum-exp (where `lse`) and all gradients.

  Options: softcap, scale; and to be drawn where True: `packed` (documents and padding in a row), `positions` of these,
  `sinks`, `slopes`, `offset`, `prefix`.
  """
  S = S or T
  plain = {key: options[key] for key in ("softcap", "scale") if key in options}
  asked = {key for key, value in options.items() if value is True}

  def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    arrays = [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]
    extra = {}
    if "packed" in asked:
      segments = np.sort(rng.integers(1, 5, (B, T)), 1).astype(np.int32)
      segments[:, T - T // 9 :] = 0
      extra["segment_ids"] = (segments, segments)
      dirty = jnp.asarray(segments == 0)[:, :, None, None]
      arrays[:3] = [jnp.where(dirty, jnp.nan, x) for x in arrays[:3]]
      if "positions" in asked:
        first = np.array([np.searchsorted(row, row) for row in segments[:, : T - T // 9]])
        extra["key_positions"] = np.arange(T, dtype=np.int32) - np.pad(first, ((0, 0), (0, T // 9))).astype(np.int32)
    if "offset" in asked:
      extra["query_offset"] = rng.integers(0, S - T + 1, B).astype(np.int32)
    if "prefix" in asked:
      extra["prefix_lengths"] = rng.integers(0, S, B).astype(np.int32)
    if "slopes" in asked:
      extra["alibi_slopes"] = (2.0 ** -np.arange(1, N + 1)).astype(np.float32)
    sinks = rng.standard_normal(N).astype(np.float32) if "sinks" in asked else None
    d_lse = rng.standard_normal((B, N, T)).astype(np.float32)
    return (*arrays, d_lse, sinks, extra), (arrays, d_lse, sinks, extra)

  def function(backend, target):
    def run(q, k, v, d_out, d_lse, sinks, extra):
      def attend(q, k, v, sinks):
        return kernels.flash_attention(
          q, k, v, visibility=visibility, sinks=sinks, return_lse=lse, backend=backend, target=target, **plain, **extra
        )

      result, pull = jax.vjp(attend, q, k, v, sinks)
      cotangent = (d_out, jnp.where(jnp.isfinite(result[1]), d_lse, 0.0)) if lse else d_out
      return result, *jax.tree.leaves(pull(cotangent))

    return run

  def truth(known):
    arrays, d_lse, sinks, extra = known
    q, k, v, d_out = (np.nan_to_num(np.asarray(x, np.float64)) for x in arrays)
    offset = extra.get("query_offset")
    seen = attention_oracle.visible(
      visibility, B, T, S,
      offset=offset, segments=extra.get("segment_ids"),
      positions=extra.get("key_positions"), prefix=extra.get("prefix_lengths"),
    )  # fmt: skip
    r = attention_oracle.attention(
      q, k, v, d_out, seen, d_lse=np.where(seen.any(-1)[:, None], d_lse, 0.0) if lse else None,
      sinks=sinks, slopes=extra.get("alibi_slopes"), offset=offset, **plain,
    )  # fmt: skip
    result = (r.out, r.lse) if lse else r.out
    return result, r.d_query, r.d_key, r.d_value, *(() if sinks is None else (r.d_sinks,))

  return Check("attention", name, function, draw, truth, quick)


def _attention():
  narrow = Visibility(window=100)
  return [
    attention("causal, H128, G4", 2, 1000, 8, 2, 128, quick=True),
    attention("causal, without lse", 1, 1000, 8, 2, 128, lse=False),
    attention("packed, window, without lse", 2, 500, 4, 2, 64, visibility=narrow, packed=True, lse=False),
    attention("bidirectional, without lse", 1, 700, 4, 2, 64, visibility=Visibility(causal=False), lse=False),
    attention("causal, H64", 1, 1000, 4, 2, 64, quick=True),
    attention("causal, H256, softcap", 1, 600, 4, 2, 256, softcap=3.0),
    attention("H80, float16", 2, 300, 4, 4, 80, dtype="float16"),
    attention("one query", 2, 1, 4, 1, 128, S=77, offset=True),
    attention("bidirectional, T != S", 1, 300, 4, 2, 128, S=700, visibility=Visibility(causal=False)),
    attention("fewer keys than queries, negative scale", 1, 500, 4, 2, 64, S=200, scale=-0.3),
    attention("window, sinks", 1, 1000, 4, 2, 128, visibility=narrow, sinks=True, quick=True),
    attention("bidirectional window", 1, 700, 4, 2, 64, visibility=Visibility(causal=False, window=90)),
    attention("packed", 2, 1000, 4, 2, 128, packed=True, quick=True),
    attention(
      "packed, window and sink tokens", 2, 900, 4, 2, 128,
      visibility=Visibility(window=60, sink_tokens=4), packed=True, positions=True,
    ),
    attention("ALiBi, H192", 1, 500, 4, 4, 192, slopes=True),
    attention(
      "offset, prefix, window, everything", 2, 300, 4, 2, 128, S=900, visibility=Visibility(window=200, sink_tokens=2),
      offset=True, prefix=True, slopes=True, sinks=True, softcap=5.0,
    ),
  ]  # fmt: skip


# ---------------------------------------------------------------- quantized matmul


def quantized(format, group, asymmetric, M, D, F, quick=False):
  """Product and gradient of the activations; codes past D are noise."""

  def draw(seed):
    rng = np.random.default_rng(seed)
    w = kernels.quantize(
      jnp.asarray(rng.standard_normal((D, F)) * 0.1, jnp.float32), format, group, asymmetric=asymmetric
    )
    x, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((M, D), (M, F)))
    if not w.packed:
      w = dataclasses.replace(w, values=w.values.at[:, D:].set(jnp.asarray(77, w.values.dtype)))
    return (x, w, dy), (x, w, dy)

  def function(backend, target):
    def run(x, w, dy):
      y, pull = jax.vjp(lambda x: kernels.quantized_matmul(x, w, backend=backend, target=target), x)
      return y, pull(dy)[0]

    return run

  def truth(known):
    x, w, dy = known
    return quantized_oracle.product(x, w), quantized_oracle.gradient(dy, w)

  name = f"{format}{f' g{group}' if group else ''}{' zeros' if asymmetric else ''} M{M} {D}x{F}"
  return Check("quantized_matmul", name, function, draw, truth, quick)


def _quantized():
  kinds = [
    ("int8", None, False), ("int4", 128, False), ("nf4", 64, False), ("int8", 64, False), ("int4", 32, True),
    ("int4", None, True), ("fp8", None, False), ("int8_dynamic", None, False), ("fp8_dynamic", None, False),
  ]  # fmt: skip
  return [
    quantized(*kind, M, D, F, quick=i < 2 and M == 16)
    for i, kind in enumerate(kinds)
    for M, D, F in ((16, 2048, 1024), (1, 1280, 200), (130, 768, 264))
    if i < 3 or M != 1
  ]


# ---------------------------------------------------------------- paged attention


def paged(name, shape, quick=False, **options):
  """Decoding or ragged prefill over pages in random order, NaN in every slot that holds no token."""
  shared = {key: value for key, value in options.items() if key != "splits"}

  def draw(seed):
    call = paged_oracle.make_call(**shape, seed=seed)
    return call.arguments, call

  def function(backend, target):
    return functools.partial(kernels.paged_attention, return_lse=True, backend=backend, target=target, **options)

  return Check("paged_attention", name, function, draw, lambda call: paged_oracle.oracle(call, **shared), quick)


def _paged():
  slopes, sinks = np.float32([0.5, 0.25, 0.1, 0.02]), np.float32([0.3, -1.0, 2.0, 0.0])
  large = dict(H=128, page_size=64)
  return [
    paged("decoding", dict(lengths=[1300, 0, 640, 41, 5], K=1, unused=1, **large), sinks=sinks, quick=True),
    paged("decoding, 3 splits", dict(lengths=[3000, 5], H=128, page_size=128), splits=3),
    paged("decoding, window, MHA, H64", dict(lengths=[1500, 65], N=2, K=2, page_size=32), window=300, splits=2),
    paged("decoding, float16, softcap", dict(lengths=[900, 33], page_size=16, dtype=jnp.float16), softcap=2.0),
    paged("decoding, int8", dict(lengths=[1400, 20], cache=jnp.int8, **large), alibi_slopes=slopes, quick=True),
    paged("mixed", dict(lengths=[700, 20], news=[300, 1], K=1, padding=3, **large), alibi_slopes=slopes, quick=True),
    paged("mixed, pages of 16, H256", dict(lengths=[500, 9], news=[150, 1], H=256), window=33, sinks=sinks),
    paged("mixed, int8, splits", dict(lengths=[640, 130], news=[50, 130], cache=jnp.int8, **large), splits=2),
  ]


# ---------------------------------------------------------------- head loss


def loss(name, B, T, D, V, *, transposed=False, head_dtype=None, quick=False, **options):
  """Sums and both gradients; x of tokens without weight is NaN."""

  def draw(seed):
    case = head_loss_oracle.Case.draw(
      B, T, D, V, dtype=jnp.bfloat16, head_dtype=head_dtype, transposed=transposed, seed=seed
    )
    x = jnp.where(case.weights[..., None] == 0, jnp.nan, case.x)
    return (x, case.turned(case.head), case.targets.astype(np.int32), case.weights), case

  def function(backend, target):
    def run(x, head, targets, weights):
      def scaled(x, head):
        sums = kernels.cross_entropy(
          x, head, targets, weights, transposed=transposed, backend=backend, target=target, **options
        )
        return 0.5 * sums.loss_sum, sums

      (dx, d_head), sums = jax.grad(scaled, (0, 1), has_aux=True)(x, head)
      return (sums.loss_sum, sums.z_loss_sum, sums.correct_sum, sums.weight_sum), dx, d_head

    return run

  def truth(case):
    sums, dx, d_head = case.oracle(**{key: value for key, value in options.items() if key != "chunk"})
    return sums, dx, case.turned(d_head)

  return Check("cross_entropy", name, function, draw, truth, quick)


def log_probs(B, T, D, V):
  """Each token's log-probability, with gradients of both results."""

  def draw(seed):
    case = head_loss_oracle.Case.draw(B, T, D, V, dtype=jnp.bfloat16, seed=seed)
    d = np.random.default_rng(seed).standard_normal((2, B, T)).astype(np.float32)
    return (case.x, case.head, case.targets.astype(np.int32), d), (case, d)

  def function(backend, target):
    def run(x, head, targets, d):
      both = lambda x, head: kernels.token_log_probs(x, head, targets, backend=backend, target=target)  # noqa: E731
      result, pull = jax.vjp(both, x, head)
      return *result, *pull((d[0], d[1]))

    return run

  return Check("cross_entropy", "token_log_probs", function, draw, lambda known: known[0].log_probs_oracle(*known[1]))


def _head_loss():
  return [
    loss("plain", 2, 300, 512, 5000, quick=True),
    loss("z-loss, softcap, odd sizes", 2, 150, 321, 3001, z_loss=1e-2, softcap=3.0),
    loss("table, smoothing", 1, 333, 256, 2000, transposed=True, label_smoothing=0.1, chunk=128),
    loss("float32 head", 1, 200, 256, 1000, head_dtype=jnp.float32),
    log_probs(1, 200, 256, 3000),
  ]


# ---------------------------------------------------------------- grouped matmul


def grouped(name, sizes, M, D, F, quick=False):
  """Product and both gradients; rows of no group are NaN."""

  def draw(seed):
    arrays = grouped_oracle.case(sizes, M, D, F, jnp.bfloat16, seed)
    return arrays, arrays

  def function(backend, target):
    def run(x, w, sizes, dy):
      multiply = functools.partial(kernels.grouped_matmul, backend=backend, target=target)
      y, pull = jax.vjp(lambda x, w: multiply(x, w, sizes), x, w)
      return y, *pull(dy)

    return run

  return Check("grouped_matmul", name, function, draw, lambda arrays: grouped_oracle.oracle(*arrays), quick)


def _grouped():
  ragged = [300, 0, 517, 64, 1, 700, 3, 200]
  return [
    grouped("ragged, a tail", ragged, 1850, 512, 768, quick=True),
    grouped("one group", [0, 0, 700, 0], 700, 256, 256),
    grouped("128 groups", grouped_oracle.sizes_of(3000, 128), 3000, 256, 192),
    grouped("no rows", [0, 0], 64, 128, 128),
  ]

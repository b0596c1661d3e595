"""Cases of `cross_entropy` and `token_log_probs`, with every option."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import kernels
from kernel_cases import peers
from kernel_cases.case import ROWS, SDS, Case, float64, joined, tagged

WORDS = 8192  # of the vocabulary that an oracle holds in float64 at once


def cross_entropy(
  M,
  D,
  V,
  *,
  dtype=jnp.bfloat16,
  backward=True,
  z_loss=0.0,
  softcap=None,
  label_smoothing=0.0,
  transposed=False,
  tokens=False,
) -> Case:
  """The head and the loss of M tokens, with the gradients of both inputs unless told otherwise.

  tokens: the log-probabilities of `token_log_probs`, and the gradients of their sum.
  """
  inputs = (SDS((1, M, D), dtype), SDS((V, D) if transposed else (D, V), dtype), SDS((1, M), jnp.int32))
  options = {"z_loss": z_loss, "softcap": softcap, "label_smoothing": label_smoothing}
  asked = {key: value for key, value in options.items() if value}
  shared = {"softcap": softcap, "transposed": transposed}

  def make(rng):
    x, head = (rng.standard_normal(s.shape, dtype=np.float32) for s in inputs[:2])
    targets = jnp.asarray(rng.integers(0, V, (1, M)), jnp.int32)
    return jnp.asarray(x, dtype), jnp.asarray(head * D**-0.5, dtype), targets

  def call(loss):
    return (lambda x, head, t: jax.value_and_grad(loss, (0, 1))(x, head, t)) if backward else loss

  def ours(backend, target):
    where = {"backend": backend, "target": target}

    def loss(x, head, targets):
      weights = jnp.ones(targets.shape, jnp.float32)
      return kernels.cross_entropy(x, head, targets, weights, transposed=transposed, **options, **where).loss_sum

    def of_tokens(x, head, targets):
      logp = kernels.token_log_probs(x, head, targets, **shared, **where)[0]
      return -logp.sum() if backward else logp

    return call(of_tokens if tokens else loss)

  name = f"M{M} D{D} V{V} {'token log probs' if tokens else 'loss'}{' and gradients' if backward else ''}"
  name += "".join(f" {key} {value:g}" for key, value in asked.items()) + (" transposed" if transposed else "")
  return Case(
    op="cross_entropy",
    name=f"{name} {jnp.dtype(dtype).name}",
    inputs=inputs,
    ours=ours,
    others={} if asked or transposed or tokens else {peer: call(loss) for peer, loss in peers.cross_entropy().items()},
    oracle=functools.partial(_oracle, options, transposed, tokens, backward),
    flops=2 * M * D * V * (3 + tokens if backward else 1),  # token by token the backward pass makes the logits again
    bytes=(M * D + D * V) * jnp.dtype(dtype).itemsize * (2 if backward else 1),
    backends=("mosaic_gpu", "pallas_tpu", "cpu", "xla"),
    make=make,
    parts=functools.partial(_parts, 2 * M * D * V),
  )


def _parts(product: float, names: list[str]) -> list[float | None]:
  """Of our kernels the one with products makes the logits, and XLA multiplies the gradients; others' are not known."""
  if names and all(name.startswith("head_loss") for name in names):
    return [None if "gradient" in name else product for name in names]
  return [product] if len(names) == 1 else [None] * len(names)


def _oracle(options, transposed, tokens, backward, inputs, result):
  """The last tokens' gradients or log-probabilities; where all logits in float64 take no minutes, everything."""
  x, head, targets = inputs[0][0], inputs[1], np.asarray(inputs[2][0])
  M, V = x.shape[0], head.shape[0 if transposed else 1]
  everything = M * V <= 1 << 24
  if not (backward or tokens or everything):
    return None  # a sum over all tokens
  rows = np.arange(M) if everything else np.arange(M - ROWS, M)
  x, targets = float64(x[rows]), targets[rows]
  words = [slice(at, min(at + WORDS, V)) for at in range(0, V, WORDS)]
  part = lambda at: float64(head[at]).T if transposed else float64(head[:, at])  # noqa: E731
  z, cap, smooth = options["z_loss"], options["softcap"], options["label_smoothing"]

  logits = np.concatenate([x @ part(at) for at in words], 1)
  slope = 1.0
  if cap:
    logits = cap * np.tanh(logits / cap)
    slope = 1 - (logits / cap) ** 2
  top = logits.max(-1, keepdims=True)
  lse = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
  at_target = logits[np.arange(len(rows)), targets]
  loss = (lse - (1 - smooth) * at_target - smooth * logits.mean(-1) + z * lse**2).sum()
  if not backward:
    return (float64(result[0, rows]), at_target - lse) if tokens else (float64(result), loss)

  d_logits = np.exp(logits - lse[:, None]) * (1 + 2 * z * lse[:, None]) - smooth / V
  d_logits[np.arange(len(rows)), targets] -= 1 - smooth
  d_logits *= slope
  value, (dx, d_head) = result
  parts = [(dx[0, rows], sum(d_logits[:, at] @ part(at).T for at in words))]
  if everything:
    wanted = x.T @ d_logits
    parts += [(value, np.asarray(loss)), (d_head, wanted.T if transposed else wanted)]
  return joined(*parts)


def cases(family: str) -> list[Case]:
  options = [{"z_loss": 1e-4}, {"softcap": 30.0}, {"label_smoothing": 0.1}, {"transposed": True}, {"tokens": True}]
  if family == "cpu":
    small = functools.partial(cross_entropy, 2048, 384, 8192, dtype=jnp.float32)
    return [
      *tagged("target", small(), cross_entropy(2048, 384, 32768, dtype=jnp.float32)),
      *tagged("shape", cross_entropy(2048, 384, 32768)),
      *tagged("option", *(small(**o) for o in options)),
    ]
  model = functools.partial(cross_entropy, 8192, 4096, 128256)
  return [
    *tagged("target", model(), model(backward=False)),
    *tagged("shape", *(cross_entropy(8192, 2048, V) for V in (32768, 151936))),
    *tagged("option", *(model(**o) for o in options), model(tokens=True, backward=False)),
  ]

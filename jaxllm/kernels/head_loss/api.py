"""`cross_entropy` and `token_log_probs`: a language-model head and its softmax, never with all logits in memory."""

import dataclasses
import functools
import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends
from jaxllm.kernels.head_loss.chunks import Coefficients, Options

HeadLayout = Literal["dv", "vd"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  """Sums over tokens, each times the token's weight; only `loss_sum` is differentiable."""

  loss_sum: Float[Array, ""]  # nats, z-loss included
  z_loss_sum: Float[Array, ""]  # the z-loss's share of it
  correct_sum: Float[Array, ""]  # of tokens whose target has the largest logit
  weight_sum: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class _Call:
  """What is fixed when a call is traced."""

  backend: str
  target: str | None
  options: Options
  z_loss: float = 0.0
  label_smoothing: float = 0.0

  @property
  def kernels(self) -> Any:
    return importlib.import_module(f"jaxllm.kernels.head_loss.{'reference' if self.backend == 'xla' else self.backend}")


def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
  head_layout: HeadLayout = "dv",
  backend: str | None = None,
  target: str | None = None,
  chunk: int | None = None,
) -> CrossEntropy:
  """Token-weighted sums of the cross-entropy of softmax(x head), in float32; differentiable in x and head.

  loss_sum = sum_t w_t (lse_t - (1 - s) logit_t[target_t] - s mean_v logit_t[v] + z_loss lse_t^2), with lse the
  logarithm of the sum of exponentials and s the label smoothing. When the loss is differentiated, the forward pass
  computes both gradients and the backward pass scales them (see `chunks`). Products run in x's dtype with float32
  sums; on TPU float32 products have the precision that jax's default says. The head's gradient is summed in float32
  over the chunks of tokens and rounded once, to the head's dtype. A head of another dtype than x's is copied into x's
  first.

  Args:
    targets: in [0, V); those of tokens without weight may be anything.
    weights: tokens of weight 0 take no part: their x may be anything too, NaN included.
    z_loss: weight of the squared log-partition (PaLM, arXiv 2204.02311, section 5).
    softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv 2408.00118).
    label_smoothing: share of the target's probability that is spread evenly over all V (Szegedy et al.,
      arXiv 1512.00567, section 7), in [0, 1).
    head_layout: "dv", or "vd" for an embedding table [V, D].
    backend: a name of `backends.BACKENDS["cross_entropy"]`, or "auto": the first that can, for `target`.
      None: "auto" where a target is given, else "xla".
      "cpu" takes the C++ kernel where there is one and no soft cap is asked for, else the same in XLA.
    target: the chip; None takes the backend that is named without asking the table.
    chunk: tokens at once; by default as many as a fixed number of logits allows.

  Raises:
    ConfigError: the shapes do not fit, or the backend cannot compute what is asked.
  """
  call, flat, targets, weights = _weighted_call(
    x, head, targets, weights, z_loss, softcap, label_smoothing, head_layout, backend, target, chunk
  )
  loss, z, correct = _cross_entropy(call, flat, head, targets, weights)
  return CrossEntropy(loss, lax.stop_gradient(z), lax.stop_gradient(correct), weights.sum())


def cross_entropy_gradients(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
  head_layout: HeadLayout = "dv",
  backend: str | None = None,
  target: str | None = None,
  chunk: int | None = None,
) -> tuple[CrossEntropy, Float[Array, "B T D"], Float[Array, "D V"] | Float[Array, "V D"]]:
  """What `cross_entropy` returns, and its loss's gradients: of x in x's dtype, of the head in float32.

  For callers that add up the head's gradient further, over devices, before it is rounded to the head's dtype.

  Args:
    all: as in `cross_entropy`.

  Raises:
    ConfigError: as `cross_entropy` does.
  """
  call, flat, targets, weights = _weighted_call(
    x, head, targets, weights, z_loss, softcap, label_smoothing, head_layout, backend, target, chunk
  )
  (loss, z, correct), dx, d_head = _sums_and_gradients(call, flat, head, targets, weights)
  return CrossEntropy(loss, z, correct, weights.sum()), dx.reshape(x.shape), d_head


def token_log_probs(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  softcap: float | None = None,
  head_layout: HeadLayout = "dv",
  backend: str | None = None,
  target: str | None = None,
  chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """(log softmax(x head)[target], log-sum-exp) of each token, in nats and float32; differentiable in x and head.

  For losses that need each token apart (preference optimisation, policy gradients, perplexity by token). The
  backward pass computes the logits once more, so where a weighted sum will do `cross_entropy` is cheaper.

  Args:
    mask: tokens to compute; the others give 0 and 0 and no gradient, whatever their x and target hold.
    softcap, head_layout, backend, target, chunk: as in `cross_entropy`.

  Raises:
    ConfigError: the shapes do not fit, or the backend cannot compute what is asked.
  """
  call, flat, ids, keep = _token_call(x, head, targets, mask, softcap, head_layout, backend, target, chunk)
  logp, lse = _token_log_probs(call, flat, head, ids)
  return tuple(jnp.where(keep, a, 0.0).reshape(targets.shape) for a in (logp, lse))  # type: ignore[return-value]


def token_log_probs_gradients(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  d_logp: Float[Array, "B T"],
  d_lse: Float[Array, "B T"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  softcap: float | None = None,
  head_layout: HeadLayout = "dv",
  backend: str | None = None,
  target: str | None = None,
  chunk: int | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "D V"] | Float[Array, "V D"]]:
  """The gradients that follow from those of `token_log_probs`: of x in x's dtype, of the head in float32.

  Args:
    d_logp, d_lse: the gradients of the two that `token_log_probs` returns.
    others: as in `token_log_probs`.

  Raises:
    ConfigError: as `token_log_probs` does.
  """
  call, flat, ids, keep = _token_call(x, head, targets, mask, softcap, head_layout, backend, target, chunk)
  cotangents = tuple(jnp.where(keep, d.reshape(-1), 0.0) for d in (d_logp, d_lse))
  dx, d_head = _token_gradients(call, flat, head, ids, cotangents)
  return dx.reshape(x.shape), d_head


def _weighted_call(
  x, head, targets, weights, z_loss, softcap, label_smoothing, head_layout, backend, target, chunk
) -> tuple[_Call, Array, Array, Array]:
  """The call, and x, targets and weights in one row of tokens."""
  if not 0.0 <= label_smoothing < 1.0:
    raise ConfigError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
  options = Options(softcap, head_layout == "vd", label_smoothing > 0, chunk)
  backend = _choose(backend, target, x, head, targets, options)
  call = _Call(backend, target, options, float(z_loss), float(label_smoothing))
  weights = weights.reshape(-1).astype(jnp.float32)
  return call, *_flat(x, targets, weights != 0), weights


def _token_call(
  x, head, targets, mask, softcap, head_layout, backend, target, chunk
) -> tuple[_Call, Array, Array, Array]:
  """The call, and x, targets and which to keep in one row of tokens."""
  options = Options(softcap, head_layout == "vd", chunk=chunk)
  call = _Call(_choose(backend, target, x, head, targets, options), target, options)
  keep = jnp.ones(targets.size, bool) if mask is None else mask.reshape(-1)
  return call, *_flat(x, targets, None if mask is None else keep), keep


def _choose(backend, target, x, head, targets, options) -> str:
  D = head.shape[1 if options.vd else 0]
  if x.ndim != 3 or head.ndim != 2 or x.shape[-1] != D or targets.shape != x.shape[:2]:
    raise ConfigError(
      f"the head's loss takes x [B, T, D], head [D, V] (or [V, D] with head_layout='vd') and targets [B, T]; "
      f"these are {x.shape}, {head.shape}, {targets.shape}"
    )

  def refuses(backend, target):
    if backend in ("xla", "cpu"):
      return None
    module = importlib.import_module(f"jaxllm.kernels.head_loss.{backend}")
    return module.refuses(x, head, options, target)

  return backends.choose("cross_entropy", backend, target, refuses)


def _flat(x, targets, keep):
  """Tokens in one row; what is not kept is cleared, because 0 times NaN is NaN."""
  x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1).astype(jnp.int32)
  return x if keep is None else jnp.where(keep[:, None], x, 0), targets


# ---------------------------------------------------------------- the weighted sum


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(call, x, head, targets, weights):
  return _sums(call, call.kernels.statistics(x, head, targets, call.options, call.target), head, weights)


def _forward(call, x, head, targets, weights):
  sums, dx, d_head = _sums_and_gradients(call, x, head, targets, weights)
  return sums, (dx, d_head, jnp.zeros((), head.dtype))


def _sums_and_gradients(call, x, head, targets, weights):
  V = head.shape[0 if call.options.vd else 1]
  smooth = call.label_smoothing
  k = Coefficients(weights, 2 * call.z_loss * weights, (1 - smooth) * weights, smooth / V * weights)
  stats, dx, d_head = call.kernels.gradients(x, head, targets, k, call.options, call.target)
  return _sums(call, stats, head, weights), dx, d_head


def _sums(call, stats, head, weights):
  V = head.shape[0 if call.options.vd else 1]
  smooth = call.label_smoothing
  nll = stats.lse - (1 - smooth) * stats.at - (smooth / V * stats.sum if smooth else 0.0)
  z = call.z_loss * stats.lse * stats.lse
  return tuple((a * weights).sum() for a in (nll + z, z, stats.at >= stats.top))


def _backward(call, saved, cotangents):
  dx, d_head, like = saved
  g = cotangents[0]
  # g is 1 / weight_sum or 1: one more pass over [M, D] and over the head, small beside the products
  return (dx * g).astype(dx.dtype), (d_head * g).astype(like.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


# ---------------------------------------------------------------- token by token


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_log_probs(call, x, head, targets):
  stats = call.kernels.statistics(x, head, targets, call.options, call.target)
  return stats.at - stats.lse, stats.lse


def _forward_tokens(call, x, head, targets):
  return _token_log_probs(call, x, head, targets), (x, head, targets)


def _backward_tokens(call, saved, cotangents):
  x, head, targets = saved
  dx, d_head = _token_gradients(call, x, head, targets, cotangents)
  return dx, d_head.astype(head.dtype), None


def _token_gradients(call, x, head, targets, cotangents):
  d_logp, d_lse = cotangents
  zeros = jnp.zeros_like(d_lse)
  k = Coefficients(d_lse - d_logp, zeros, -d_logp, zeros)
  _, dx, d_head = call.kernels.gradients(x, head, targets, k, call.options, call.target)
  return dx, d_head


_token_log_probs.defvjp(_forward_tokens, _backward_tokens)

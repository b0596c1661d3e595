"""`cross_entropy` and `token_log_probs`: a language-model head and its softmax, never with all logits in memory.

Backends have `forward(call, x [M, D], head, targets [M])`, the statistics of every token's logits, and
`backward(call, x, head, targets, coefficients)`, those and the gradients of x and, in float32, of the head, which is
None where `call.options.of_head` is not set.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import dispatch
from jaxllm.kernels.head_loss.chunks import UNWANTED, Coefficients, Options


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  """Sums over tokens, each times the token's weight; only `loss_sum` is differentiable."""

  loss_sum: Float[Array, ""]  # nats, z-loss included
  z_loss_sum: Float[Array, ""]  # the z-loss's share of it
  correct_sum: Float[Array, ""]  # of tokens whose target has the largest logit
  weight_sum: Float[Array, ""]


def cross_entropy(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
  transposed: bool = False,
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
    transposed: the head is [V, D], an embedding table.
    backend, target: as in `backends.choose`. "cpu" takes the C++ kernel where there is one and no soft cap is asked
      for, else the same in XLA.
    chunk: tokens at once; by default as many as a fixed number of logits allows.

  Raises:
    ConfigError: the shapes do not fit, or the backend cannot compute what is asked.
  """
  options = Options(softcap, transposed, chunk, z_loss, label_smoothing)
  call, *arrays = _weighted_call(x, head, targets, weights, options, backend, target)
  loss, z, correct = dispatch.run(call, *arrays)
  return CrossEntropy(loss, lax.stop_gradient(z), lax.stop_gradient(correct), arrays[-1].sum())


def cross_entropy_gradients(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  *,
  of_head: bool = True,
  backend: str | None = None,
  target: str | None = None,
  **options: Any,
) -> tuple[CrossEntropy, Float[Array, "B T D"], Float[Array, "D V"] | Float[Array, "V D"] | None]:
  """What `cross_entropy` returns, and its loss's gradients: of x in x's dtype, of the head in float32.

  For callers that add up the head's gradient further, over devices, before it is rounded to the head's dtype, or that
  do without it (a frozen head's), which saves a third of the products. Options and errors are those of `cross_entropy`.

  Args:
    of_head: whether to compute the head's gradient, which else is None.
  """
  call, *arrays = _weighted_call(x, head, targets, weights, Options(of_head=of_head, **options), backend, target)
  (loss, z, correct), dx, d_head = _sums_and_gradients(call, *arrays)
  return CrossEntropy(loss, z, correct, arrays[-1].sum()), dx.reshape(x.shape), d_head


def token_log_probs(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  *,
  mask: Bool[Array, "B T"] | None = None,
  softcap: float | None = None,
  transposed: bool = False,
  backend: str | None = None,
  target: str | None = None,
  chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
  """(log softmax(x head)[target], log-sum-exp) of each token, in nats and float32; differentiable in x and head.

  For losses that need each token apart (preference optimisation, policy gradients, perplexity by token). The
  backward pass computes the logits once more, so where a weighted sum will do `cross_entropy` is cheaper.

  Args:
    mask: tokens to compute; the others give 0 and 0 and no gradient, whatever their x and target hold.
    softcap, transposed, backend, target, chunk: as in `cross_entropy`.

  Raises:
    ConfigError: the shapes do not fit, or the backend cannot compute what is asked.
  """
  options = dict(softcap=softcap, transposed=transposed, chunk=chunk, backend=backend, target=target)
  call, flat, ids, keep = _token_call(x, head, targets, mask, **options)
  logp, lse = dispatch.run(call, flat, head, ids)
  return tuple(jnp.where(keep, a, 0.0).reshape(targets.shape) for a in (logp, lse))  # type: ignore[return-value]


def token_log_probs_and_slopes(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  **options: Any,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T D"]]:
  """What `token_log_probs` returns, and the gradient of each token's log-probability by its x, in x's dtype.

  For callers that differentiate in x alone, whose backward pass is then one multiplication: the logits are computed
  once. Options and errors are those of `token_log_probs`.
  """
  call, flat, ids, keep = _token_call(x, head, targets, of_head=False, **options)
  ones, zeros = jnp.where(keep, 1.0, 0.0), jnp.zeros(keep.shape)
  stats, dx, _ = call.module.backward(call, flat, head, ids, Coefficients(-ones, zeros, -ones, zeros))
  logp, lse = (jnp.where(keep, a, 0.0).reshape(targets.shape) for a in (stats.at - stats.lse, stats.lse))
  return logp, lse, dx.reshape(x.shape)


def token_log_probs_gradients(
  x: Float[Array, "B T D"],
  head: Float[Array, "D V"] | Float[Array, "V D"],
  targets: Int[Array, "B T"],
  d_logp: Float[Array, "B T"],
  d_lse: Float[Array, "B T"],
  *,
  of_head: bool = True,
  **options: Any,
) -> tuple[Float[Array, "B T D"], Float[Array, "D V"] | Float[Array, "V D"] | None]:
  """The gradients that follow from those of `token_log_probs`: of x in x's dtype, of the head in float32.

  Options and errors are those of `token_log_probs`.

  Args:
    d_logp, d_lse: the gradients of the two that `token_log_probs` returns.
    of_head: whether to compute the head's gradient, which else is None.
  """
  call, flat, ids, keep = _token_call(x, head, targets, of_head=of_head, **options)
  dx, d_head = _token_gradients(
    call, flat, head, ids, tuple(jnp.where(keep, d.reshape(-1), 0.0) for d in (d_logp, d_lse))
  )
  return dx.reshape(x.shape), d_head


def _weighted_call(x, head, targets, weights, options, backend, target):
  """The call, and x, head, targets and weights with the tokens in one row."""
  if not 0.0 <= options.label_smoothing < 1.0:
    raise ConfigError(f"label_smoothing must be in [0, 1), not {options.label_smoothing}")
  call = _choose(SUM, backend, target, options, x, head, targets)
  weights = weights.reshape(-1).astype(jnp.float32)
  x, targets = _flat(x, targets, weights != 0)
  return call, x, head, targets, weights


def _token_call(x, head, targets, mask=None, backend=None, target=None, **options):
  """The call, and x, targets and which to keep in one row of tokens."""
  call = _choose(TOKENS, backend, target, Options(**options), x, head, targets)
  keep = jnp.ones(targets.size, bool) if mask is None else mask.reshape(-1)
  return call, *_flat(x, targets, None if mask is None else keep), keep


def _choose(op, backend, target, options, x, head, targets) -> dispatch.Call:
  D = head.shape[1 if options.transposed else 0]
  if x.ndim != 3 or head.ndim != 2 or x.shape[-1] != D or targets.shape != x.shape[:2]:
    raise ConfigError(
      f"the head's loss takes x [B, T, D], head [D, V] (or, transposed, [V, D]) and targets [B, T]; "
      f"these are {x.shape}, {head.shape}, {targets.shape}"
    )
  return dispatch.choose("cross_entropy", op, backend, target, options, x, head)


def _flat(x, targets, keep):
  """Tokens in one row; what is not kept is cleared, because 0 times NaN is NaN."""
  x, targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1).astype(jnp.int32)
  if keep is None:
    return x, targets
  return jnp.where(keep[:, None], x, 0), jnp.where(keep, targets, UNWANTED)


# ---------------------------------------------------------------- the weighted sum


def _sums(call, stats, head, weights):
  options = call.options
  smooth = options.label_smoothing
  nll = stats.lse - (1 - smooth) * stats.at - (smooth / options.words(head) * stats.sum if smooth else 0.0)
  z = options.z_loss * stats.lse * stats.lse
  return tuple((a * weights).sum() for a in (nll + z, z, stats.at >= stats.top))


def _forward(call, x, head, targets, weights):
  return _sums(call, call.module.forward(call, x, head, targets), head, weights)


def _sums_and_gradients(call, x, head, targets, weights):
  options = call.options
  smooth = options.label_smoothing
  each = 2 * options.z_loss * weights, (1 - smooth) * weights, smooth / options.words(head) * weights
  stats, dx, d_head = call.module.backward(call, x, head, targets, Coefficients(weights, *each))
  return _sums(call, stats, head, weights), dx, d_head


def _kept(call, x, head, targets, weights):
  sums, dx, d_head = _sums_and_gradients(call, x, head, targets, weights)
  return sums, (dx, d_head, jnp.zeros((), head.dtype))


def _backward(call, kept, cotangents):
  dx, d_head, like = kept
  g = cotangents[0]
  # g is 1 / weight_sum or 1: one more pass over [M, D] and over the head, small beside the products
  return (dx * g).astype(dx.dtype), (d_head * g).astype(like.dtype), None, None


SUM = dispatch.Op("head_loss", _forward, _kept, _backward)


# ---------------------------------------------------------------- token by token


def _forward_tokens(call, x, head, targets):
  stats = call.module.forward(call, x, head, targets)
  return stats.at - stats.lse, stats.lse


def _token_gradients(call, x, head, targets, cotangents):
  d_logp, d_lse = cotangents
  zeros = jnp.zeros_like(d_lse)
  return call.module.backward(call, x, head, targets, Coefficients(d_lse - d_logp, zeros, -d_logp, zeros))[1:]


def _backward_tokens(call, kept, cotangents):
  dx, d_head = _token_gradients(call, *kept, cotangents)
  return dx, d_head.astype(kept[1].dtype), None


TOKENS = dispatch.Op("head_loss", _forward_tokens, backward=_backward_tokens)

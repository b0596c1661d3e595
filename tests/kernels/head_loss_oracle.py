"""The head's cross-entropy and its derivatives in float64 numpy, written from the definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.kernels import cross_entropy, token_log_probs


@dataclasses.dataclass
class Case:
  """One call's inputs: head as [D, V], a head of another layout is turned when it is called."""

  x: jax.Array
  head: jax.Array
  targets: np.ndarray
  weights: np.ndarray
  transposed: bool

  @classmethod
  def draw(cls, B, T, D, V, *, dtype=jnp.float32, head_dtype=None, transposed=False, seed=0):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((B, T, D)), dtype)
    head = jnp.asarray(rng.standard_normal((D, V)) * 2 * D**-0.5, head_dtype or dtype)
    targets = rng.integers(0, V, (B, T))
    targets[0, -1], targets[0, 0] = V - 1, 0
    return cls(x, head, targets, rng.integers(0, 3, (B, T)).astype(np.float32), transposed)

  def turned(self, head):
    return head.T if self.transposed else head

  def loss(self, x, head, **options):
    targets, weights = jnp.asarray(self.targets), jnp.asarray(self.weights)
    return cross_entropy(x, head, targets, weights, transposed=self.transposed, **options)

  def sums_and_gradients(self, scale=0.5, **options):
    """(loss_sum, z_loss_sum, correct_sum, weight_sum), and of `scale` times the loss: d_x, d_head [D, V]."""

    def scaled(x, head):
      sums = self.loss(x, head, **options)
      return scale * sums.loss_sum, sums

    run = jax.jit(jax.grad(scaled, (0, 1), has_aux=True))
    (dx, d_head), sums = run(self.x, self.turned(self.head))
    assert dx.dtype == self.x.dtype and d_head.dtype == self.head.dtype
    return (sums.loss_sum, sums.z_loss_sum, sums.correct_sum, sums.weight_sum), dx, self.turned(d_head)

  def log_probs_and_gradients(self, d_logp, d_lse, **options):
    """(logp, lse, d_x, d_head [D, V])."""
    run = lambda x, h: token_log_probs(x, h, jnp.asarray(self.targets), transposed=self.transposed, **options)  # noqa: E731
    (logp, lse), pull = jax.vjp(jax.jit(run), self.x, self.turned(self.head))
    dx, d_head = jax.jit(pull)((jnp.asarray(d_logp, jnp.float32), jnp.asarray(d_lse, jnp.float32)))
    return logp, lse, dx, self.turned(d_head)

  def logits(self, softcap):
    """(x [M, D], head, logits [M, V], their slope by the soft cap) of the tokens, in float64."""
    x = np.asarray(self.x, np.float64).reshape(-1, self.x.shape[-1])
    head = np.asarray(self.head.astype(self.x.dtype), np.float64)
    z = x @ head
    if softcap is None:
      return x, head, z, 1.0
    return x, head, softcap * np.tanh(z / softcap), 1 - np.tanh(z / softcap) ** 2

  def oracle(self, *, z_loss=0.0, softcap=None, label_smoothing=0.0, scale=0.5):
    """What `sums_and_gradients` must give. Tokens without weight are left out."""
    keep = self.weights.reshape(-1) != 0
    x, head, z, slope = self.logits(softcap)
    w, t = self.weights.reshape(-1).astype(np.float64), self.targets.reshape(-1)
    x, z, w, t = x[keep], z[keep], w[keep], t[keep]
    slope = slope if softcap is None else slope[keep]
    lse, p = _softmax(z)
    V = z.shape[1]
    q = np.full_like(z, label_smoothing / V)  # the distribution that is asked for
    q[np.arange(len(t)), t] += 1 - label_smoothing
    nll = -(q * (z - lse[:, None])).sum(-1)
    dz = scale * w[:, None] * (p * (1 + 2 * z_loss * lse)[:, None] - q) * slope
    dx = np.zeros((len(keep), x.shape[1]))
    dx[keep] = dz @ head.T
    correct = (w * (z[np.arange(len(t)), t] >= z.max(-1))).sum()
    penalty = (w * z_loss * lse**2).sum()
    return ((w * nll).sum() + penalty, penalty, correct, w.sum()), dx.reshape(self.x.shape), x.T @ dz

  def log_probs_oracle(self, d_logp, d_lse, *, softcap=None):
    """What `log_probs_and_gradients` must give."""
    x, head, z, slope = self.logits(softcap)
    lse, p = _softmax(z)
    t = self.targets.reshape(-1)
    a, b = (np.asarray(d, np.float64).reshape(-1, 1) for d in (d_logp, d_lse))
    dz = p * (b - a)
    dz[np.arange(len(t)), t] += a[:, 0]
    dz = dz * slope
    logp = z[np.arange(len(t)), t] - lse
    shape = self.targets.shape
    return logp.reshape(shape), lse.reshape(shape), (dz @ head.T).reshape(self.x.shape), x.T @ dz


def _softmax(z):
  top = z.max(-1, keepdims=True)
  e = np.exp(z - top)
  return (top + np.log(e.sum(-1, keepdims=True)))[:, 0], e / e.sum(-1, keepdims=True)


def close(got, want, tolerance):
  """Finite, and off by no more than the tolerance times the largest of the truth, everywhere."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    error, limit = np.abs(a - b).max(), tolerance * max(np.abs(b).max(), 1e-6)
    assert error <= limit, f"off by {error}, {error / limit * tolerance:.2g} of the largest"


def temporaries(function, M, D, V, dtype, compile_):
  """Temporary bytes of a loss and its gradients, by the compiler's own account."""
  s = jax.ShapeDtypeStruct
  inputs = s((1, M, D), dtype), s((D, V), dtype), s((1, M), jnp.int32), s((1, M), jnp.float32)
  run = lambda x, h, t, w: jax.value_and_grad(function, (0, 1))(x, h, t, w)  # noqa: E731
  return compile_(run, inputs).memory_analysis().temp_size_in_bytes


def all_logits(x, head, targets, weights):
  """The loss as one would write it without this kernel."""
  z = jnp.einsum("BTD,DV->BTV", x, head, preferred_element_type=jnp.float32)
  at = jnp.take_along_axis(z, targets[..., None], -1)[..., 0]
  return ((jax.nn.logsumexp(z, -1) - at) * weights).sum()


def assert_little_memory(loss, compile_, growth=True, M=8192, D=4096, V=128256):
  """Temporary bytes beside the head's gradient, whose sum over chunks is in float32, are under 15% of those of
  all logits, and (growth) at twice the vocabulary no more than another copy of the head in 16 bits above that."""
  unfused = 2 * 4 * M * V  # logits and their gradient in float32: `assert_all_logits_take` says that this is so

  def beside_the_sum(V):
    return temporaries(loss, M, D, V, jnp.bfloat16, compile_) - 4 * D * V

  fused = beside_the_sum(V)
  assert fused < 0.15 * unfused, fused / unfused
  if growth:
    assert beside_the_sum(2 * V) < 1.1 * fused + 2 * D * V


def assert_all_logits_take(compile_, M=8192, V=128256):
  """What `assert_little_memory` divides by is no more than what the compiler needs without this kernel."""
  assert temporaries(all_logits, M, 256, V, jnp.bfloat16, compile_) >= 2 * 4 * M * V

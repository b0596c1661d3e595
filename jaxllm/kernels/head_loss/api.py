"""Cross-entropy of a language-model head that never holds all logits.

Tokens pass in chunks: a chunk's logits are made, reduced, turned into their own gradient and multiplied out before
the next chunk starts, so memory is [chunk, V] instead of a few times [B, T, V] (Liger kernel, Hsu et al. 2024,
arXiv 2410.10989). When the loss is differentiated the forward pass computes both gradients, the backward pass scales
them.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.kernels import cpu_ffi

Backend = Literal["xla", "cpu"]


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
  head_layout: Literal["dv", "vd"] = "dv",
  backend: Backend = "xla",
  chunk: int = 1024,
) -> CrossEntropy:
  """Token-weighted sums for one head; loss_sum = sum_t w_t (lse_t - logit_t[target_t] + z_loss lse_t^2), in float32,
  is differentiable in x and head. `head_layout` 'vd': head is an embedding table [V, D]. `softcap` c: logits become
  c tanh(logits / c) (Gemma 2). The product runs in x's dtype with float32 sums; head's gradient has head's dtype.
  Backend 'cpu' takes the C++ kernel where there is one and no soft cap is asked for.
  """
  dtypes = {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}
  native = (
    backend == "cpu"
    and softcap is None
    and {x.dtype, head.dtype} <= dtypes
    and not (x.dtype == jnp.float32 and head.dtype == jnp.bfloat16)
    and cpu_ffi.available()
  )
  B, T, D = x.shape
  options = (float(z_loss), softcap, head_layout == "vd", native, min(chunk, B * T))
  flat = (
    x.reshape(B * T, D),
    head,
    targets.reshape(-1).astype(jnp.int32),
    weights.reshape(-1).astype(jnp.float32),
  )
  nll_z, z, correct = _cross_entropy(options, *flat)
  stop = lax.stop_gradient
  return CrossEntropy(nll_z, stop(z), stop(correct), flat[3].sum())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, x, head, targets, weights):
  return _sums(options, x, head, targets, weights, grad=False)[0]


def _forward(options, x, head, targets, weights):
  sums, dx, dhead = _sums(options, x, head, targets, weights, grad=True)
  return sums, (dx, dhead, jnp.zeros((), head.dtype))


def _backward(options, saved, cotangents):
  dx, dhead, like = saved
  g = cotangents[0]
  # g is 1 / weight_sum or 1: one more pass over [M, D] and over the head, small beside the products
  return (dx * g.astype(dx.dtype)), (dhead * g).astype(like.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def _sums(options, x, head, targets, weights, grad):
  """((loss_sum, z_loss_sum, correct_sum), dx [M, D] | None, dhead float32 | None)."""
  z_loss, softcap, vd, native, chunk = options
  if native:
    M = x.shape[0]
    out = (
      jax.ShapeDtypeStruct((3, M), jnp.float32),
      jax.ShapeDtypeStruct(x.shape if grad else (0, 0), x.dtype),
      jax.ShapeDtypeStruct(head.shape if grad else (0, 0), jnp.float32),
    )
    stats, dx, dhead = cpu_ffi.call(
      "cpu_cross_entropy", out, x, head, targets, weights, head_vd=vd, grad=grad, z_loss=np.float32(z_loss)
    )
    nll, z, correct = stats @ weights
    return (nll + z_loss * z, z_loss * z, correct), dx, dhead
  return _xla_sums(z_loss, softcap, vd, chunk, x, head, targets, weights, grad)


def _xla_sums(z_loss, softcap, vd, chunk, x, head, targets, weights, grad):
  M, D = x.shape
  pad = -M % chunk
  x, targets, weights = (jnp.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1)) for a in (x, targets, weights))
  w = head.astype(x.dtype)

  def split(a):
    return a.reshape(-1, chunk, *a.shape[1:])

  def body(carry, part):
    sums, dhead = carry
    xc, t, wt = part
    z = lax.dot_general(xc, w, (((1,), (1 if vd else 0,)), ((), ())), preferred_element_type=jnp.float32)
    if softcap is not None:
      tanh = jnp.tanh(z / softcap)
      z = softcap * tanh
    top = z.max(-1)
    e = jnp.exp(z - top[:, None])
    total = e.sum(-1)
    lse = top + jnp.log(total)
    at = jnp.take_along_axis(z, t[:, None], axis=-1)[:, 0]
    z_term = z_loss * lse * lse
    sums = sums + jnp.stack([((lse - at + z_term) * wt).sum(), (z_term * wt).sum(), ((at >= top) * wt).sum()])
    if not grad:
      return (sums, dhead), None
    dz = e * (wt * (1.0 + 2.0 * z_loss * lse) / total)[:, None]
    dz = dz - jnp.where(jnp.arange(z.shape[-1])[None] == t[:, None], wt[:, None], 0.0)
    if softcap is not None:
      dz = dz * (1.0 - tanh * tanh)
    dz = dz.astype(x.dtype)
    dx = lax.dot_general(dz, w, (((1,), (0 if vd else 1,)), ((), ())), preferred_element_type=jnp.float32)
    a, b = (dz, xc) if vd else (xc, dz)
    dhead = dhead + lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (sums, dhead), dx.astype(x.dtype)

  start = (jnp.zeros(3, jnp.float32), jnp.zeros(head.shape if grad else (), jnp.float32))
  (sums, dhead), dx = lax.scan(body, start, (split(x), split(targets), split(weights)))
  return tuple(sums), (dx.reshape(-1, D)[:M] if grad else None), dhead

"""RMSNorm, SwiGLU and RoPE with one-pass CPU kernels (`kernels/cpu/elementwise.cc`), forward and backward; LayerNorm,
log-softmax, and what keeps a product's rounding.

Each function's 'xla' backend is the reference; 'cpu' computes in float32 inside and rounds once at the end, and is left
to XLA for a few rows. 'cpu_invariant' takes the kernel for any number of rows, each of which it computes by itself.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxllm.kernels import cpu_ffi

Backend = Literal["xla", "cpu", "cpu_invariant"]
FEW_ROWS = 32  # below this a call costs more than it saves


def _native(backend: str, *arrays) -> bool:
  rows = arrays[0].shape[0] * arrays[0].shape[1] if arrays[0].ndim > 2 else arrays[0].shape[0]
  return (
    (backend == "cpu" and rows >= FEW_ROWS or backend == "cpu_invariant" and rows > 0)
    and all(a.dtype in (jnp.float32, jnp.bfloat16) for a in arrays)
    and cpu_ffi.available()
  )


def _like(a):
  return jax.ShapeDtypeStruct(a.shape, a.dtype)


# ---------------------------------------------------------------- RMSNorm


def rms_norm(
  x: Float[Array, "*batch D"], w: Float[Array, " D"], *, eps: float, backend: Backend = "xla"
) -> Float[Array, "*batch D"]:
  """x / sqrt(mean(x^2) + eps) * w over the last axis, in float32, returned in x's dtype (Zhang & Sennrich 2019)."""
  if not _native(backend, x, w):
    x32 = x.astype(jnp.float32)
    y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y * w.astype(jnp.float32)).astype(x.dtype)
  return _rms_norm(float(eps), x.reshape(-1, x.shape[-1]), w.astype(jnp.float32)).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(eps, x, w):
  return _rms_norm_fwd(eps, x, w)[0]


def _rms_norm_fwd(eps, x, w):
  out = (_like(x), jax.ShapeDtypeStruct(x.shape[:1], jnp.float32))
  y, rstd = cpu_ffi.call("cpu_rms_norm", out, x, w, eps=np.float32(eps))
  return y, (x, w, rstd)


def _rms_norm_bwd(eps, saved, dy):
  x, w, rstd = saved
  out = (_like(x), jax.ShapeDtypeStruct((16, x.shape[1]), jnp.float32))  # 16 partial sums of dw, one per task
  dx, dw = cpu_ffi.call("cpu_rms_norm_grad", out, x, w, rstd, dy)
  return dx, dw.sum(0)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


# ---------------------------------------------------------------- LayerNorm


def layer_norm(
  x: Float[Array, "*batch D"],
  w: Float[Array, " D"],
  b: Float[Array, " D"] | None,
  *,
  eps: float,
  backend: Backend = "xla",
) -> Float[Array, "*batch D"]:
  """(x - mean) / sqrt(variance + eps) * w + b over the last axis, in float32, returned in x's dtype (Ba et al. 2016).

  'cpu' is XLA's.
  """
  if backend == "cpu_invariant" and _native(backend, x, w):
    bias = jnp.zeros_like(w) if b is None else b
    return _layer_norm(float(eps), x, w.astype(jnp.float32), bias.astype(jnp.float32))
  return _plain_layer_norm(eps, x, w, b)


def _plain_layer_norm(eps, x, w, b):
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * w
  return (y if b is None else y + b).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _layer_norm(eps, x, w, b):
  rows = x.reshape(-1, x.shape[-1])
  return cpu_ffi.call("cpu_layer_norm", _like(rows), rows, w, b, eps=np.float32(eps)).reshape(x.shape)


_layer_norm.defvjp(
  lambda eps, *arrays: (_layer_norm(eps, *arrays), arrays),
  lambda eps, arrays, dy: jax.vjp(functools.partial(_plain_layer_norm, eps), *arrays)[1](dy),
)


# ---------------------------------------------------------------- rounding


def materialized(x: Float[Array, "*shape"], *, backend: Backend = "xla") -> Float[Array, "*shape"]:
  """x; with 'cpu_invariant' it is in memory before anything follows.

  XLA:CPU multiplies and adds in one rounding where a product and a sum fall into one loop, which depends on what else
  is in the program; optimization barriers are gone by then.
  """
  return _materialized(x) if backend == "cpu_invariant" and _native(backend, x) else x


@jax.custom_vjp
def _materialized(x):
  return cpu_ffi.call("cpu_copy", _like(x), x)


_materialized.defvjp(lambda x: (_materialized(x), None), lambda _, dy: (dy,))


# ---------------------------------------------------------------- log-softmax


def log_softmax(logits: Float[Array, "N V"], *, backend: Backend = "xla") -> Float[Array, "N V"]:
  """Log-probabilities over the last axis, float32; 'cpu' is XLA's, and 'cpu_invariant' has no gradient."""
  if backend != "cpu_invariant" or logits.size == 0:
    return jax.nn.log_softmax(logits, axis=-1)
  logits = materialized(logits.astype(jnp.float32), backend=backend)
  return logits - logit_statistics(logits, jnp.zeros(logits.shape[0], jnp.int32))[0][:, None]


def logit_statistics(logits: Float[Array, "M V"], targets: Int[Array, " M"]) -> Float[Array, "4 M"]:
  """Of each row's logits in C++: the log-sum-exp, the target's (0 if it is none), the largest, and the sum."""
  out = jax.ShapeDtypeStruct((4, logits.shape[0]), jnp.float32)
  return cpu_ffi.call("cpu_logit_statistics", out, logits.astype(jnp.float32), targets.astype(jnp.int32))


# ---------------------------------------------------------------- SwiGLU


def swiglu(
  gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], *, backend: Backend = "xla"
) -> Float[Array, "*batch F"]:
  """silu(gate) * up (Shazeer 2020). Saves only its inputs."""
  if not _native(backend, gate, up):
    return jax.nn.silu(gate) * up
  return _swiglu(gate, up)


@jax.custom_vjp
def _swiglu(gate, up):
  return cpu_ffi.call("cpu_swiglu", _like(gate), gate, up)


def _swiglu_bwd(saved, dy):
  gate, up = saved
  return cpu_ffi.call("cpu_swiglu_grad", (_like(gate), _like(up)), gate, up, dy)


_swiglu.defvjp(lambda gate, up: (_swiglu(gate, up), (gate, up)), _swiglu_bwd)


# ---------------------------------------------------------------- RoPE


def rope(
  x: Float[Array, "B T N H"],
  cos: Float[Array, "B T H/2"],
  sin: Float[Array, "B T H/2"],
  *,
  backend: Backend = "xla",
) -> Float[Array, "B T N H"]:
  """Rotates the halves (a, b) of the head dimension: (a cos - b sin, b cos + a sin) (Su et al. 2021, Llama layout).

  cos and sin are constants (no gradient). Computed in float32, returned in x's dtype.
  """
  if not _native(backend, x):
    return lax.platform_dependent(x, cos, sin, tpu=_rope_by_product, cuda=_rope_by_roll, default=_rope_by_halves)
  B, T, N, H = x.shape
  flat = (a.astype(jnp.float32).reshape(B * T, H // 2) for a in (cos, sin))
  return _rope(x.reshape(B * T, N, H), *flat).reshape(x.shape)


def _rope_by_halves(x, cos, sin):
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  c, s = cos[:, :, None].astype(jnp.float32), sin[:, :, None].astype(jnp.float32)
  return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1).astype(x.dtype)


def _rope_by_roll(x, cos, sin):
  """The halves change places: half by half, the gradient is one more pass on a GPU. On a CPU this is slower."""
  return _rope_of(x, jnp.roll(x.astype(jnp.float32), x.shape[-1] // 2, axis=-1), cos, sin)


def _rope_by_product(x, cos, sin):
  """The halves change places in the matrix unit: a TPU's vectors are 128 wide, and half of one is a pass of its own."""
  places = np.roll(np.eye(x.shape[-1]), x.shape[-1] // 2, axis=-1)
  precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # sums of one number: exact in 16 bits
  rolled = jnp.einsum(
    "btnh,hg->btng", x, jnp.asarray(places, x.dtype), precision=precision, preferred_element_type=jnp.float32
  )
  return _rope_of(x, rolled, cos, sin)


def _rope_of(x, rolled, cos, sin):
  cos, sin = cos.astype(jnp.float32)[:, :, None], sin.astype(jnp.float32)[:, :, None]
  cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
  return (x.astype(jnp.float32) * cos + rolled * sin).astype(x.dtype)


@jax.custom_vjp
def _rope(x, cos, sin):
  return cpu_ffi.call("cpu_rope", _like(x), x, cos, sin, sign=np.float32(1))


_rope.defvjp(
  lambda x, cos, sin: (_rope(x, cos, sin), (cos, sin)),
  lambda saved, dy: (cpu_ffi.call("cpu_rope", _like(dy), dy, *saved, sign=np.float32(-1)), None, None),
)

"""Matrix product that rounds master weights where it uses them, and whose backward pass is fast on CPUs.

Why a rule for the gradient: differentiating `x @ w.astype(x.dtype)` rounds the weight's gradient to x's 16 bits, and
devices then add up their parts in 16 bits. Here it is summed in float32 and leaves in the weight's own dtype.

Why a kernel: XLA:CPU fuses the elementwise operations of the backward pass into the transposed copy that it
makes of a matmul's operands, and recomputes them there with a stride. Barriers around the operands prevent it; the
C++ product (`kernels/cpu/matmul.cc`) reads transposed operands while it packs them, so there is no copy at all, and
multiplies bfloat16 on the CPU's tile unit (AMX) where there is one.

Backend 'cpu_invariant' sums each row in one order, however many there are: that of the C++ product of many rows.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import cpu_ffi

Backend = Literal["xla", "cpu", "cpu_invariant"]
PACKED_ROWS = 32  # from so many on packing the weights, as the C++ product does, costs less than it gains
PACKED_ROWS_BFLOAT16 = 17  # of which XLA:CPU multiplies a few several times slower
FEW_ROWS = 16  # up to so many it reads them where they lie


def matmul(
  x: Float[Array, "*batch I"],
  w: Float[Array, "I O"],
  *,
  backend: Backend = "xla",
  transposed: bool = False,
  dtype: DTypeLike | None = None,
) -> Float[Array, "*batch O"]:
  """x @ w, summed in float32 and returned in x's dtype; differentiable in both.

  `w` may be float32 beside a 16-bit `x` (master weights): it is rounded to x's dtype inside, in the backward pass
  again, so that no rounded copy is kept, and its gradient is summed and comes out in w's own dtype. A narrower w is
  widened.

  Backend 'cpu' uses the C++ product where `cpu_ffi.available()`, else XLA's between optimization barriers. XLA:CPU
  multiplies one row of bfloat16 in a scalar loop, 40 times slower than memory; the C++ product of a few rows reads the
  weights once.

  Args:
    transposed: w is [O, I], an embedding table; only a few rows of x go to C++ then.
    dtype: of the result, where it is not to be rounded to x's.
  """
  dtype = jnp.dtype(x.dtype if dtype is None else dtype)
  if jnp.promote_types(x.dtype, w.dtype) != w.dtype:
    w = w.astype(x.dtype)
  rows = x.size // max(1, x.shape[-1])
  few = 0 < rows <= FEW_ROWS and _use_ffi(x, w)
  if backend == "cpu_invariant":
    return _matmul_cpu(x, w, transposed, True, dtype)
  if backend == "cpu" and (few or rows >= _packed_rows(x) and not transposed):
    return _matmul_cpu(x, w, transposed, False, dtype)
  return _dot(x, w, transposed, dtype) if w.dtype == x.dtype else _matmul_xla(x, w, transposed).astype(dtype)


def _dot(x, w, transposed, dtype=None):
  dtype = None if dtype == x.dtype else dtype
  # A transposed one is contracted as it lies: XLA:CPU would copy the transposed matrix.
  if transposed:
    return jnp.einsum("...i,oi->...o", x, w, preferred_element_type=dtype)
  return jnp.matmul(x, w, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul_xla(x, w, transposed):
  return _dot(x, w.astype(x.dtype), transposed)


def _forward_xla(x, w, transposed):
  # The product itself and not this rule once more, whose inside the policies of `jax.checkpoint` do not see.
  return _dot(x, w.astype(x.dtype), transposed), (x, w)


def _backward_xla(transposed, saved, dy):
  x, w = saved
  dx = _dot(dy, w.astype(x.dtype), not transposed)
  tokens = tuple(range(x.ndim - 1))
  a, b = (dy, x) if transposed else (x, dy)
  return dx, lax.dot_general(a, b, ((tokens, tokens), ((), ())), preferred_element_type=w.dtype)


_matmul_xla.defvjp(_forward_xla, _backward_xla)


# x stays as it came until it is multiplied: what several products keep of it is then one array for the backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul_cpu(x, w, transposed, in_order, dtype):
  return _like((product_in_order if in_order else product)(_flat(x), w, dtype, transpose_b=transposed), x)


def _forward(x, w, transposed, in_order, dtype):
  return _matmul_cpu(x, w, transposed, in_order, dtype), (x, w)


def _backward(transposed, in_order, dtype, saved, dy):
  x, w = saved
  rows, dy = _flat(x), _flat(dy).astype(x.dtype)
  if not _use_ffi(x, w):  # keep the neighbours' elementwise operations out of the operand copies
    rows, dy = lax.optimization_barrier((rows, dy))
  dx = product(dy, w, x.dtype, transpose_b=not transposed)
  dw = product(*((dy, rows) if transposed else (rows, dy)), w.dtype, transpose_a=True)
  if not _use_ffi(x, w):
    dx, dw = lax.optimization_barrier((dx, dw))
  return dx.reshape(x.shape), dw


_matmul_cpu.defvjp(_forward, _backward)


def low_rank_matmul(
  x: Float[Array, "*batch I"],
  w: Float[Array, "I O"],
  a: Float[Array, "I r"],
  b: Float[Array, "r O"],
  *,
  backend: Backend = "xla",
) -> Float[Array, "*batch O"]:
  """x @ w + (x @ a) @ b in x's dtype; differentiable in all four.

  On CPUs the C++ product adds the second one to a block of the first while that is in the cache, and rounds no
  difference by itself; so in the backward pass, for x's gradient. Elsewhere it is three products and a sum.
  """
  weights = (w, a, b)
  plain = x.dtype in (jnp.float32, jnp.bfloat16) and all(w.dtype in (x.dtype, jnp.float32) for w in weights)
  rows = x.size // max(1, x.shape[-1])
  if backend == "cpu" and plain and rows >= _packed_rows(x) and min(*w.shape, *b.shape) > 0 and _use_ffi(x):
    return _low_rank_cpu(x, *weights)
  return matmul(x, w, backend=backend) + matmul(matmul(x, a, backend=backend), b, backend=backend)


@jax.custom_vjp
def _low_rank_cpu(x, w, a, b):
  return _forward_low_rank(x, w, a, b)[0]


def _forward_low_rank(x, w, a, b):
  narrow = product(_flat(x), a, x.dtype)
  return _like(_plus(_flat(x), w, narrow, b, False), x), (x, w, a, b, narrow)


def _backward_low_rank(saved, dy):
  x, w, a, b, narrow = saved
  rows, dy = _flat(x), _flat(dy)
  d_narrow = product(dy, b, x.dtype, transpose_b=True)
  dx = _plus(dy, w, d_narrow, a, True)
  dw, da = (product(rows, d, of.dtype, transpose_a=True) for d, of in ((dy, w), (d_narrow, a)))
  return dx.reshape(x.shape), dw, da, product(narrow, dy, b.dtype, transpose_a=True)


_low_rank_cpu.defvjp(_forward_low_rank, _backward_low_rank)


def _plus(a, b, a2, b2, transposed):
  out = jax.ShapeDtypeStruct((a.shape[0], b.shape[0 if transposed else 1]), a.dtype)
  return cpu_ffi.call("cpu_matmul_plus", out, a, b, a2, b2, tb=transposed)


def _packed_rows(x) -> int:
  return PACKED_ROWS_BFLOAT16 if x.dtype == jnp.bfloat16 else PACKED_ROWS


def _flat(x):
  return x.reshape(-1, x.shape[-1])


def _like(rows, x):
  return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _use_ffi(*arrays) -> bool:
  return all(a.dtype in (jnp.float32, jnp.bfloat16) for a in arrays) and cpu_ffi.available()


def product(
  a: Float[Array, "M K"],
  b: Float[Array, "K N"],
  dtype,
  *,
  transpose_a: bool = False,
  transpose_b: bool = False,
) -> Float[Array, "M N"]:
  """a @ b on the CPU without a gradient rule; `transpose_*`: the operand is given transposed.

  Multiplies in bfloat16 if either operand is bfloat16, sums in float32 and returns `dtype`.
  """
  rows, cols = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
  if _use_ffi(a, b) and min(rows, cols, a.size) > 0:
    bf16 = jnp.bfloat16 in (a.dtype, b.dtype)
    out = jax.ShapeDtypeStruct((rows, cols), dtype if bf16 else jnp.float32)
    return cpu_ffi.call("cpu_matmul", out, a, b, ta=transpose_a, tb=transpose_b).astype(dtype)
  compute = jnp.bfloat16 if jnp.bfloat16 in (a.dtype, b.dtype) else a.dtype
  dims = (((0 if transpose_a else 1,), (1 if transpose_b else 0,)), ((), ()))
  return lax.dot_general(a.astype(compute), b.astype(compute), dims, preferred_element_type=jnp.float32).astype(dtype)


def product_in_order(
  a: Float[Array, "M K"], b: Float[Array, "K N"], dtype, *, transpose_b: bool = False
) -> Float[Array, "M N"]:
  """`product` of which each row is, to the bit, the same among any number of rows.

  Raises:
    ConfigError: operands that are neither float32 nor bfloat16, or there are no C++ kernels.
  """
  if not _use_ffi(a, b):
    raise ConfigError(f"the batch-invariant product is of float32 and bfloat16 in C++, not of {a.dtype} and {b.dtype}")
  cols = b.shape[0 if transpose_b else 1]
  if min(a.shape[0], cols, a.size) == 0:
    return jnp.zeros((a.shape[0], cols), dtype)
  out = jax.ShapeDtypeStruct((a.shape[0], cols), dtype if jnp.bfloat16 in (a.dtype, b.dtype) else jnp.float32)
  return cpu_ffi.call("cpu_matmul_in_order", out, a, b, tb=transpose_b).astype(dtype)

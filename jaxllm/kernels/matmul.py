"""Matrix product whose backward pass is fast on CPUs.

Why a kernel at all: XLA:CPU fuses the elementwise operations of the backward pass into the transposed copy that it
makes of a matmul's operands, and recomputes them there with a stride. Barriers around the operands prevent it; the
C++ product (`kernels/cpu/matmul.cc`) reads transposed operands while it packs them, so there is no copy at all, and
multiplies bfloat16 on the CPU's tile unit (AMX) where there is one.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxllm.kernels import cpu_ffi

Backend = Literal["xla", "cpu"]
FEW_ROWS = 32  # below this the weights are read once and packing them, as the C++ product does, costs more


def matmul(
  x: Float[Array, "*batch I"], w: Float[Array, "I O"], *, backend: Backend = "xla"
) -> Float[Array, "*batch O"]:
  """x @ w, summed in float32 and returned in x's dtype; differentiable in both.

  `w` may be float32 beside a bfloat16 `x` (master weights): it is rounded to x's dtype inside, and its gradient
  comes out in w's own dtype. Backend 'cpu' uses the C++ product where `cpu_ffi.available()`, else XLA's between
  optimization barriers.
  """
  if backend == "xla" or x.size // x.shape[-1] < FEW_ROWS:
    return jnp.matmul(x, w.astype(x.dtype))
  return _matmul_cpu(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[-1])


@jax.custom_vjp
def _matmul_cpu(x, w):
  return product(x, w, x.dtype)


def _forward(x, w):
  return _matmul_cpu(x, w), (x, w)


def _backward(saved, dy):
  x, w = saved
  if not _use_ffi(x, w):  # keep the neighbours' elementwise operations out of the operand copies
    x, dy = lax.optimization_barrier((x, dy))
  dx = product(dy, w, x.dtype, transpose_b=True)
  dw = product(x, dy, w.dtype, transpose_a=True)
  if not _use_ffi(x, w):
    dx, dw = lax.optimization_barrier((dx, dw))
  return dx, dw


_matmul_cpu.defvjp(_forward, _backward)


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

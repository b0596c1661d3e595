"""Cases of `grouped_matmul`: the product, each gradient, and groups of every size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import kernels
from kernel_cases import peers
from kernel_cases.case import SDS, Case, alone, float64, tagged

GROUPS = {"even": 4.0, "skewed": 0.1}  # concentration of the Dirichlet distribution that the groups' shares are of


def grouped_matmul(M, E, D, F, *, dtype=jnp.bfloat16, gradient=None, groups="even") -> Case:
  """M rows sorted by expert times their experts' matrices.

  Args:
    gradient: "x" or "weights" instead of the product.
    groups: sizes alike ("even"), few that have most rows ("skewed"), or every other one without rows ("empty").
  """
  x, w, dy, sizes = SDS((M, D), dtype), SDS((E, D, F), dtype), SDS((M, F), dtype), SDS((E,), jnp.int32)

  def make(rng):
    draw = lambda s: jnp.asarray(rng.standard_normal(s.shape, dtype=np.float32) * D**-0.5, dtype)  # noqa: E731
    shares = rng.dirichlet(np.full(E, GROUPS.get(groups, 4.0)))
    if groups == "empty":
      shares = np.where(np.arange(E) % 2, shares, 0)
    return draw(x), draw(w), draw(dy), jnp.asarray(rng.multinomial(M, shares / shares.sum()), jnp.int32)

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

  def oracle(inputs, result):
    """Of the largest group: its first rows, or a corner of its matrix' gradient."""
    x, w, dy, sizes = inputs
    sizes = np.asarray(sizes)
    e = int(sizes.argmax())
    start = int(sizes[:e].sum())
    if gradient == "weights":
      rows, corner = slice(start, start + int(sizes[e])), slice(0, 128)
      return float64(result[e, corner, corner]), float64(x[rows, corner]).T @ float64(dy[rows, corner])
    rows = slice(start, start + min(int(sizes[e]), 128))
    a, b = (x, float64(w[e])) if gradient is None else (dy, float64(w[e]).T)
    return float64(result[rows]), float64(a[rows]) @ b

  name = f"M{M} E{E} {D}x{F} {jnp.dtype(dtype).name}{f' d{gradient}' if gradient else ''}"
  return Case(
    op="grouped_matmul",
    name=name + (f" {groups} groups" if groups != "even" else ""),
    inputs=(x, w, dy, sizes),
    ours=ours,
    others=peers.grouped_matmul(of, dtype, gradient),
    oracle=oracle,
    flops=2 * M * D * F,
    bytes=(x.size + dy.size + w.size) * jnp.dtype(dtype).itemsize,
    backends=("mosaic_gpu", "pallas_tpu", "xla"),
    make=make,
    parts=alone(2 * M * D * F),
  )


def cases(family: str) -> list[Case]:
  gradients = (None, "x", "weights")
  if family == "cpu":
    small = functools.partial(grouped_matmul, 2048, 8, 384, 1024, dtype=jnp.float32)
    return [
      *tagged("target", *(small(gradient=g) for g in gradients)),
      *tagged("values", *(small(gradient=g, groups="empty") for g in gradients)),
    ]
  return [
    *tagged("shape", *(grouped_matmul(16384, 8, 4096, 14336, gradient=g) for g in gradients)),
    *tagged("shape", *(grouped_matmul(32768, 128, 2048, 768, gradient=g) for g in gradients)),
    *tagged(
      "values",
      *(grouped_matmul(32768, 128, 2048, 768, gradient=g, groups=s) for s in ("skewed", "empty") for g in gradients),
    ),
  ]

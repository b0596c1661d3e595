"""Cases of `quantized_matmul`: every format, few tokens and many, and the gradient."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxllm import kernels
from kernel_cases import peers
from kernel_cases.case import SDS, Case, alone, float64, tagged

FORMATS = (("int8", None), ("int4", 128), ("nf4", 64), ("fp8", None), ("int8_dynamic", None), ("fp8_dynamic", None))
PART = 128  # rows and columns of a result that the oracle computes


def quantized_matmul(M, D, F, format, *, group_size=None, asymmetric=False, dtype=jnp.bfloat16, backward=False) -> Case:
  """Activations times a quantized weight; the bar is the dense product, whose weight is 2 to 4 times as large."""
  x, dense = SDS((M, D), dtype), SDS((D, F), dtype)
  quantize = functools.partial(kernels.quantize, format=format, group_size=group_size, asymmetric=asymmetric)
  weight = jax.eval_shape(quantize, SDS((D, F), jnp.float32))
  dy = SDS((M, F), dtype)

  def make(rng):
    w = jnp.asarray(rng.standard_normal((D, F), dtype=np.float32) * D**-0.5)
    rows = jnp.asarray(rng.standard_normal((M, F if backward else D), dtype=np.float32), dtype)
    return rows, quantize(w), w.astype(dtype)

  def ours(backend, target):
    multiply = functools.partial(kernels.quantized_matmul, backend=backend, target=target)
    if backward:  # of a linear function, at any point
      return lambda dy, weight, _: jax.vjp(lambda x: multiply(x, weight), jnp.zeros((M, D), dtype))[1](dy)[0]
    return lambda x, weight, _: multiply(x, weight)

  def oracle(inputs, result):
    rows, weight, _ = inputs
    part = float64(rows[:PART])
    if backward:
      return float64(result[:PART, :PART]), part @ _dense(weight, inputs=PART).T
    return float64(result[:PART, :PART]), _rounded(part, weight) @ _dense(weight, features=PART)

  stored = sum(a.size * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(weight))
  others = {f"dense {jnp.dtype(dtype).name}": lambda x, _, w: x @ (w.T if backward else w)}
  if format == "int8" and group_size is None and dtype == jnp.bfloat16 and not backward:
    others["jax mixed-type matmul"] = peers.mixed_matmul
  return Case(
    op="quantized_matmul",
    name=f"M{M} {D}x{F} {format}{f' g{group_size}' if group_size else ''}{' zeros' if asymmetric else ''}"
    f"{' dx' if backward else ''}",
    inputs=(dy if backward else x, weight, dense),
    ours=ours,
    others=others,
    oracle=oracle,
    flops=2 * M * D * F,
    bytes=stored + (x.size + dy.size) * jnp.dtype(dtype).itemsize,
    backends=("mosaic_gpu", "pallas_tpu", "cpu", "xla"),
    make=make,
    parts=alone(2 * M * D * F) if M >= 256 and not weight.dynamic else None,  # fewer tokens: bytes
  )


def _dense(weight, features=None, inputs=None) -> np.ndarray:
  """The first inputs and output features of the weight [D, F] in float64, by the definition of its format."""
  d = np.arange(weight.in_features)[:inputs]
  scales = float64(weight.scales[:, :features])
  zeros = None if weight.zeros is None else float64(weight.zeros[:, :features])
  if weight.format in ("int4", "nf4"):  # byte j of a block of 128 holds code j below and code 128 + j above
    stored = np.asarray(weight.values[:features])[:, d // 256 * 128 + d % 128]
    codes = np.where(d % 256 < 128, stored & 15, stored >> 4)
  else:
    codes = np.asarray(weight.values[:features])[:, d]
  group = d // weight.group_size if weight.group_size else np.zeros(len(d), int)
  if weight.format == "nf4":
    real = np.asarray(kernels.quantized.weights.NF4, np.float64)[codes]
  else:
    real = codes.astype(np.float64)
  if weight.format == "int4":
    real -= 8 if zeros is None else zeros[group].T
  return (real * scales[group].T).T


def _rounded(rows, weight):
  """Activations as a dynamic format multiplies them, each row with its own scale."""
  if not weight.dynamic:
    return rows
  bound = 127 if weight.format == "int8_dynamic" else 448
  scale = float64((np.abs(rows).max(-1, keepdims=True) / bound).astype(np.float32))
  codes = (rows / scale).astype(np.float32)
  return float64(np.round(codes) if bound == 127 else codes.astype(ml_dtypes.float8_e4m3fn)) * scale


def cases(family: str) -> list[Case]:
  if family == "cpu":
    small = functools.partial(quantized_matmul, D=2048, F=8192, dtype=jnp.float32)
    return [
      *tagged("target", *(small(M, format=f, group_size=g) for M in (1, 64) for f, g in (*FORMATS[:3], FORMATS[4]))),
    ]
  model = functools.partial(quantized_matmul, D=4096, F=14336)
  return [
    *tagged("target", *(model(M, format=f, group_size=g) for f, g in FORMATS[:2] for M in (1, 4, 8, 16))),
    *tagged("shape", *(model(M, format=f, group_size=g) for f, g in FORMATS[:2] for M in (64, 256, 4096))),
    *tagged("shape", *(model(M, format=f, group_size=g) for f, g in FORMATS[2:] for M in (1, 16, 256, 4096))),
    *tagged("option", *(model(4096, format=f, group_size=g, backward=True) for f, g in FORMATS[:4])),
    *tagged("option", *(model(M, format="int4", group_size=128, asymmetric=True) for M in (16, 4096))),
    *tagged("option", model(16, format="int8", group_size=128), model(16, format="int4")),
  ]

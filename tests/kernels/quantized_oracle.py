"""Quantized products in float64 numpy, from the definitions of the formats and of their layout."""

import ml_dtypes
import numpy as np

# bitsandbytes' table of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = np.array(
  [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
  + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
  + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)


def dense(weight) -> np.ndarray:
  """[D, F] in float64, code by code."""
  values, scales = np.asarray(weight.values), np.asarray(weight.scales, np.float64)
  zeros = None if weight.zeros is None else np.asarray(weight.zeros, np.float64)
  D, F = weight.shape
  d = np.arange(D)
  if weight.format in ("int4", "nf4"):
    inside = d % 256  # byte j of a block's 128: code j below, code 128 + j above
    byte = values[:, d // 256 * 128 + inside % 128]
    codes = np.where(inside < 128, byte & 15, byte >> 4)
  else:
    codes = values[:, :D]
  group = np.zeros(D, int) if weight.group_size is None else d // weight.group_size
  if weight.format == "nf4":
    real = NF4[codes]
  else:
    real = codes.astype(np.float64)
  if weight.format == "int4":
    real = real - (8 if zeros is None else zeros.T[:, group])
  return (real * scales.T[:, group]).T


def product(x, weight) -> np.ndarray:
  """x W; dynamic formats round each token to 8 bits first, with the float32 scale that the definition gives."""
  x = np.asarray(x, np.float64)
  if weight.format.endswith("_dynamic"):
    bound = 127 if weight.format.startswith("int8") else 448
    scale = (np.abs(x).max(-1, keepdims=True) / bound).astype(np.float32).astype(np.float64)
    scale[scale == 0] = 1
    codes = (x / scale).astype(np.float32)
    codes = np.round(codes) if bound == 127 else codes.astype(ml_dtypes.float8_e4m3fn)
    x = codes.astype(np.float64) * scale
  return x @ dense(weight)


def gradient(dy, weight) -> np.ndarray:
  """dy W^T."""
  return np.asarray(dy, np.float64) @ dense(weight).T

"""Hugging Face checkpoints whose matrices are in 8 or 4 bits with a scale for each block, read as bfloat16.

fp8: DeepSeek-V3's and Kimi-K2's. Beside a float8_e4m3 matrix X.weight [O, I] stands X.weight_scale_inv, a factor for
each block of `weight_block_size` (DeepSeek-V3, arXiv 2412.19437, section 3.3). mxfp4: gpt-oss's. Of a tensor X
[E, I, O] of experts there are X_blocks [E, O, I / 32, 16], two codes a byte, the first in its low half, and X_scales
[E, O, I / 32], exponents of two (OCP Microscaling Formats 1.0, section 5.3).
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.tensors import LazyTensor, Tensors

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SCALE = "_scale_inv"
_HALF = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # of float4_e2m1
MXFP4 = np.concatenate([_HALF, -_HALF])


def is_block_scaled(method: Any) -> bool:
  """Whether config.json's quantization_config is of one of the two."""
  return isinstance(method, Mapping) and method.get("quant_method") in ("fp8", "mxfp4")


def dequantized(method: Mapping[str, Any], tensors: Tensors) -> dict[str, LazyTensor]:
  """The same checkpoint with its plain matrices, each made when it is read.

  Args:
    method: config.json's quantization_config, one of which `is_block_scaled` is true.

  Raises:
    ConfigError: a way of fp8 that is not known here.
    CheckpointError: a matrix lacks its scales, or the two do not fit.
  """
  return _fp8(method, tensors) if method["quant_method"] == "fp8" else _mxfp4(tensors)


def _fp8(method, tensors):
  block = method.get("weight_block_size")
  if not (isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
    raise ConfigError(f"config.json has fp8 weights with weight_block_size = {block!r}; two sizes are needed")
  plain = {}
  for name, tensor in tensors.items():
    if name.endswith(SCALE):
      continue
    if not tensor.dtype.name.startswith("float8"):
      plain[name] = tensor
      continue
    wanted = tuple(math.ceil(n / size) for n, size in zip(tensor.shape, block))
    scales = _beside(tensors, name, name + SCALE, wanted)
    plain[name] = LazyTensor(tensor.shape, BFLOAT16, functools.partial(_read_fp8, tensor, scales, block))
  return plain


def _read_fp8(tensor, scales, block):
  factors = scales.read().astype(np.float32)
  for axis, size in enumerate(block):
    factors = np.repeat(factors, size, axis)
  rows, columns = tensor.shape
  return (tensor.read().astype(np.float32) * factors[:rows, :columns]).astype(BFLOAT16)


def _mxfp4(tensors):
  plain = {}
  for name, tensor in tensors.items():
    if name.endswith("_scales"):
      continue
    if not name.endswith("_blocks"):
      plain[name] = tensor
      continue
    stem = name.removesuffix("_blocks")
    if len(tensor.shape) != 4 or tensor.shape[-1] != 16:
      raise CheckpointError(f"the tensor {name} has shape {tensor.shape}, which is not of blocks of 32 codes")
    scales = _beside(tensors, name, f"{stem}_scales", tensor.shape[:-1])
    experts, outputs, blocks, _ = tensor.shape
    read = functools.partial(_read_mxfp4, tensor, scales)
    plain[stem] = LazyTensor((experts, 32 * blocks, outputs), BFLOAT16, read)
  return plain


def _read_mxfp4(tensor, scales):
  codes = tensor.read()
  values = MXFP4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*codes.shape[:-1], 32)
  values = np.ldexp(values, scales.read().astype(np.int32)[..., None] - 127).astype(BFLOAT16)
  return np.swapaxes(values.reshape(*codes.shape[:2], -1), 1, 2)


def _beside(tensors: Tensors, name: str, other: str, shape: tuple[int, ...]) -> LazyTensor:
  if other not in tensors:
    raise CheckpointError(f"the checkpoint lacks the tensor {other}, without which {name} says nothing")
  if tensors[other].shape != shape:
    raise CheckpointError(f"the tensor {other} has shape {tensors[other].shape}; {name} calls for {shape}")
  return tensors[other]

"""Hugging Face checkpoints whose matrices are in 4 bits as bitsandbytes has them (NF4, arXiv 2305.14314).

Beside a tensor X of bytes stand X.absmax, X.quant_map and X.quant_state.bitsandbytes__nf4 (JSON), and where the absmax
are in 8 bits X.nested_absmax and X.nested_quant_map. The matrix, [outputs, inputs], is rounded in blocks of its
numbers in order. Where blocks divide rows, they are the groups along the inputs that a `QuantizedWeight` has.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping
from typing import Any, Required, TypedDict

import jax.numpy as jnp
import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.strangers import Real, Size, declared, parse_json
from jaxllm.interop.bitsandbytes_int8 import Int8, unpacked_int8
from jaxllm.interop.families import table
from jaxllm.interop.huggingface import check_count, places
from jaxllm.interop.stored import param_shapes
from jaxllm.interop.tensors import Index, LazyTensor, Tensors
from jaxllm.kernels.quantized.weights import NF4, from_codes
from jaxllm.models.config import ModelConfig
from jaxllm.models.quantization import BLOCK, DoubleQuantizedWeight, dynamic_map

logger = logging.getLogger("jaxllm")
STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def is_bitsandbytes(method: Any) -> bool:
  """Whether config.json's quantization_config is of bitsandbytes."""
  known = isinstance(method, dict) and method.get("quant_method", "bitsandbytes") == "bitsandbytes"
  return known and bool(method.get("load_in_4bit") or method.get("load_in_8bit"))


@dataclasses.dataclass(frozen=True)
class Packed:
  """A matrix in 4 bits: [outputs, inputs] = `shape`; parts: X.absmax and so on, by their last names."""

  name: str
  shape: tuple[int, int]
  block: int
  nested_block: int | None
  nested_offset: float
  packed: LazyTensor
  parts: Mapping[str, LazyTensor]

  def __post_init__(self):
    count = math.prod(self.shape)
    sizes = {"absmax": -(-count // self.block), "quant_map": 16}
    if self.nested_block:
      sizes |= {"nested_absmax": -(-sizes["absmax"] // self.nested_block), "nested_quant_map": 256}
    for name, size in sizes.items():
      if name not in self.parts or math.prod(self.parts[name].shape) != size:
        raise CheckpointError(f"the quantized tensor {self.name} has no {name} of {size} numbers")
    if math.prod(self.packed.shape) * self.packed.dtype.itemsize != -(-count // 2):
      raise CheckpointError(f"the quantized tensor {self.name} has not {count} codes of 4 bits")

  def codes(self) -> np.ndarray:
    """uint8 [outputs, inputs]; the first of two codes is in the high half of a byte."""
    packed = self.packed.read().reshape(-1).view(np.uint8)
    return np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: math.prod(self.shape)].reshape(self.shape)

  def absmax(self) -> np.ndarray:
    """float32, of each block."""
    found = self.parts["absmax"].read().reshape(-1)
    if not self.nested_block:
      return found.astype(np.float32)
    numbers, outer = (self.parts[name].read().reshape(-1) for name in ("nested_quant_map", "nested_absmax"))
    return numbers[found] * np.repeat(outer, self.nested_block)[: len(found)] + np.float32(self.nested_offset)

  def dense(self) -> np.ndarray:
    """The matrix in float32."""
    scales = np.repeat(self.absmax(), self.block)[: math.prod(self.shape)].reshape(self.shape)
    return self.parts["quant_map"].read().reshape(-1)[self.codes()] * scales

  def is_grouped(self) -> bool:
    """Whether a `QuantizedWeight` can be it."""
    numbers = self.parts["quant_map"].read().reshape(-1)
    return self.shape[1] % self.block == 0 and np.array_equal(numbers, np.asarray(NF4, np.float32))

  def weight(self, outputs: slice) -> Any:
    """Some of the outputs as a weight here, its absmax in 8 bits if they are and all outputs are wanted."""
    codes = jnp.asarray(self.codes()[outputs].T)
    per_output = lambda x: x.reshape(self.shape[0], -1)[outputs].T  # noqa: E731
    plain = from_codes(codes, jnp.asarray(per_output(self.absmax())), None, "nf4", self.block)
    whole = len(range(*outputs.indices(self.shape[0]))) == self.shape[0]
    if not whole or self.nested_block != BLOCK:
      return plain
    if not np.array_equal(self.parts["nested_quant_map"].read().reshape(-1), dynamic_map()):
      return plain
    scales = np.zeros(plain.scales.shape, np.uint8)
    own = per_output(self.parts["absmax"].read().reshape(-1))
    scales[: len(own)] = own
    blocks = jnp.asarray(self.parts["nested_absmax"].read().reshape(-1), jnp.float32)
    double = dataclasses.replace(plain, scales=jnp.asarray(scales))
    return DoubleQuantizedWeight(double, blocks, jnp.asarray(self.nested_offset, jnp.float32))


def unpacked(method: Mapping[str, Any], tensors: Tensors) -> tuple[dict[str, LazyTensor], Mapping[str, Packed | Int8]]:
  """The tensors with those in 4 or 8 bits multiplied out when they are read, in float32; and these as they are.

  Args:
    method: config.json's quantization_config.

  Raises:
    ConfigError: another type than nf4. CheckpointError: parts of a tensor are missing or do not fit.
  """
  if method.get("load_in_8bit"):
    return unpacked_int8(tensors)
  if method.get("bnb_4bit_quant_type", "nf4") != "nf4" or any(f"{STATE}fp4" in name for name in tensors):
    raise ConfigError("the weights are in bitsandbytes' fp4, which cannot be read here; quantize the original to nf4")
  found: dict[str, Packed] = {}
  rest = dict(tensors)
  for key in [key for key in tensors if key.endswith(f"{STATE}nf4")]:
    name = key.removesuffix(f"{STATE}nf4")
    del rest[key]
    parts = {part: rest.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in rest}
    if name not in rest:
      raise CheckpointError(f"the checkpoint lacks the tensor {name}, whose {key} it has")
    found[name] = _packed(name, rest[name], tensors[key], parts)
    rest[name] = LazyTensor(found[name].shape, np.dtype(np.float32), found[name].dense)
  return rest, found


class _State(TypedDict, total=False):
  """X.quant_state.bitsandbytes__nf4."""

  shape: Required[list[Size]]
  blocksize: Required[Size]
  nested_blocksize: Size
  nested_offset: Real


def _packed(name: str, tensor: LazyTensor, state: LazyTensor, parts: Mapping[str, LazyTensor]) -> Packed:
  what = f"the state of the quantized tensor {name}"
  if math.prod(state.shape) > 10_000:
    raise CheckpointError(f"{what} cannot be read: it has {math.prod(state.shape)} bytes")
  told = parse_json(state.read().astype(np.uint8).tobytes(), what)
  told = declared(_State, told if isinstance(told, dict) else {}, what, CheckpointError)
  if len(told["shape"]) != 2:
    raise CheckpointError(f"{what} cannot be read: it is of no matrix")
  outputs, inputs = told["shape"]
  offset = told.get("nested_offset", 0.0)
  nested = told.get("nested_blocksize") if "nested_absmax" in parts else None
  return Packed(name, (outputs, inputs), told["blocksize"], nested, offset, tensor, parts)


def turned(
  tensors: Tensors, packed: Mapping[str, Packed | Int8], config: ModelConfig, family: str
) -> dict[str, LazyTensor]:
  """The tensors with quantized ones as the family has them: of GPT-2's [inputs, outputs], turned back."""
  check_count(config, len(tensors))
  known, names = places(config, family, list(packed))
  found = dict(tensors)
  for name, matrix in packed.items():
    place = known.get(names[name])
    if place and place.weight.transform in (table.SAME, table.COLUMNS):
      found[name] = LazyTensor(matrix.shape[::-1], np.dtype(np.float32), lambda m=matrix: np.asarray(m.dense().T))
  return found


def kept(
  params: Tensors, packed: Mapping[str, Packed | Int8], config: ModelConfig, family: str
) -> dict[str, LazyTensor]:
  """The parameters, quantized ones with their layers' weights as `quantized`."""
  known, names = places(config, family, list(packed))
  shapes, found = param_shapes(config), dict(params)
  layers: dict[str, dict[Index, Any]] = {}
  left = 0
  for name, matrix in packed.items():
    if names[name] not in known:
      continue
    weight, at, _ = known[names[name]]
    transforms = (table.TRANSPOSED, table.ROWS, table.SAME, table.COLUMNS)
    if len(at) != 1 or weight.transform not in transforms or not matrix.is_grouped():
      left += 1
      continue
    start = 0
    for path in weight.ours:
      stop = start + shapes[path][-1]
      layers.setdefault(path, {})[at] = functools.partial(matrix.weight, slice(start, stop))
      start = stop
  for path, own in layers.items():
    if len(own) == shapes[path][0]:
      found[path] = dataclasses.replace(params[path], quantized=lambda index, own=own: own[index]())
  if left:
    logger.info(
      "%d of %d quantized tensors are multiplied out: their blocks are no groups of inputs", left, len(packed)
    )
  return found

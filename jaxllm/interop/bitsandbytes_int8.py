"""Hugging Face checkpoints whose matrices are in 8 bits as bitsandbytes has them (LLM.int8, arXiv 2208.07339).

Beside M.weight of int8 [outputs, inputs] stands M.SCB, the largest magnitude of each output, which is the code 127.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.tensors import LazyTensor, Tensors
from jaxllm.kernels.quantized.weights import from_codes

SCALES, ORDER = ".SCB", ".weight_format"


@dataclasses.dataclass(frozen=True)
class Int8:
  """A matrix in 8 bits, [outputs, inputs] = `shape`."""

  shape: tuple[int, ...]
  codes: LazyTensor
  largest: LazyTensor  # [outputs]

  @property
  def _scales(self) -> np.ndarray:
    return self.largest.read().astype(np.float32) / np.float32(127)

  def dense(self) -> np.ndarray:
    """The matrix in float32."""
    return self.codes.read().astype(np.float32) * self._scales[:, None]

  def is_grouped(self) -> bool:
    """Whether a `QuantizedWeight` can be it."""
    return True

  def weight(self, outputs: slice) -> Any:
    """Some of the outputs as a weight here."""
    codes = jnp.asarray(self.codes.read()[outputs].T)
    return from_codes(codes, jnp.asarray(self._scales[None, outputs]), None, "int8", None)


def unpacked_int8(tensors: Tensors) -> tuple[dict[str, LazyTensor], dict[str, Int8]]:
  """The tensors with those in 8 bits multiplied out when they are read, in float32; and these as they are.

  Raises:
    CheckpointError: parts of a tensor are missing or do not fit.
  """
  found: dict[str, Int8] = {}
  rest = {name: tensor for name, tensor in tensors.items() if not name.endswith((SCALES, ORDER))}
  for module in (name.removesuffix(SCALES) for name in tensors if name.endswith(SCALES)):
    name, largest, order = f"{module}.weight", tensors[module + SCALES], tensors.get(module + ORDER)
    codes = tensors.get(name)
    if codes is None or codes.dtype != np.int8 or len(codes.shape) != 2 or largest.shape != codes.shape[:1]:
      raise CheckpointError(f"the checkpoint has {module}{SCALES} but no {name} of as many rows in int8")
    if order is not None and math.prod(order.shape) == 1 and int(order.read().reshape(())) != 0:
      raise CheckpointError(
        f"the codes of {name} are not in the order of rows; save the model with a newer bitsandbytes"
      )
    found[name] = Int8(codes.shape, codes, largest)
    rest[name] = LazyTensor(codes.shape, np.dtype(np.float32), found[name].dense)
  return rest, found

"""Settings of the device mesh."""

import dataclasses
from typing import Annotated

from jaxllm.base.errors import ConfigError
from jaxllm.base.ranges import Range

AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")  # outermost (slowest links) first
SLOW_AXES = ("data", "stage", "fsdp", "expert")  # the others speak several times a layer: not between TPU slices


@dataclasses.dataclass(frozen=True)
class AxisRules:
  """Logical axis of an array -> the mesh axes that split it; () keeps it whole on every device."""

  batch: tuple[str, ...] = ("data", "fsdp", "expert")
  seq: tuple[str, ...] = ("context",)
  layers: tuple[str, ...] = ()
  embed: tuple[str, ...] = ("fsdp",)
  heads: tuple[str, ...] = ("tensor",)
  kv_heads: tuple[str, ...] = ("tensor",)
  head_dim: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ("tensor",)
  vocab: tuple[str, ...] = ("tensor",)
  expert: tuple[str, ...] = ("expert",)
  expert_batch: tuple[str, ...] = ("data", "fsdp")  # rows of tokens that lie sorted by expert

  def __post_init__(self):
    for field in dataclasses.fields(self):
      for axis in getattr(self, field.name):
        if axis not in AXES:
          raise ConfigError(f"mesh.rules.{field.name} names {axis!r}; the mesh axes are {', '.join(AXES)}")


Axis = Annotated[int, Range(-1, never=(0,), words="be at least 1, or -1 for the devices left over")]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many ways each mesh axis splits the devices; one axis may be -1: whatever is left over."""

  data: Axis = -1
  stage: Axis = 1
  fsdp: Axis = 1
  expert: Axis = 1
  context: Axis = 1
  tensor: Axis = 1
  rules: AxisRules = AxisRules()

  def __post_init__(self):
    if sum(getattr(self, a) == -1 for a in AXES) > 1:
      raise ConfigError("only one mesh axis may be -1 (the devices left over)")
    for axis in AXES:
      size = getattr(self, axis)
      if size < 1 and size != -1:
        raise ConfigError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the devices left over")

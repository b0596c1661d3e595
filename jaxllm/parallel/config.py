"""Settings of the device mesh."""

import dataclasses

from jaxllm.errors import ConfigError

AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")  # outermost (slowest links) first


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How many ways each mesh axis splits the devices; one axis may be -1: whatever is left over."""

  data: int = -1
  stage: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1

  def __post_init__(self):
    if sum(getattr(self, a) == -1 for a in AXES) > 1:
      raise ConfigError("only one mesh axis may be -1 (the devices left over)")
    for axis in AXES:
      size = getattr(self, axis)
      if size < 1 and size != -1:
        raise ConfigError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the devices left over")

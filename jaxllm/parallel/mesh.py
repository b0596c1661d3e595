"""The device mesh: one vocabulary of axes, any of which may be 1."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxllm.errors import ConfigError
from jaxllm.parallel.config import AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges the devices as `config` says, outermost axis first.

  Args:
    config: the size of each axis; -1 takes the devices that the others leave over.
    devices: by default all devices of all hosts; a mesh smaller than their number takes the first ones
      (one host only).

  Raises:
    ConfigError: the axes need more devices than there are, or do not divide them.
  """
  devices = list(jax.devices() if devices is None else devices)
  if config.stage > 1:
    raise ConfigError(f"mesh.stage is {config.stage}, but nothing is split along it yet; set it to 1")
  sizes = {axis: getattr(config, axis) for axis in AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = len(devices) // fixed
      if sizes[axis] * fixed != len(devices):
        raise ConfigError(
          f"the mesh axes other than {axis} take {fixed} devices, which does not divide the {len(devices)} "
          f"there are; change mesh.* or set mesh.{axis}"
        )
  need = math.prod(sizes.values())
  if need > len(devices):
    shape = " x ".join(f"{a} {n}" for a, n in sizes.items() if n > 1)
    raise ConfigError(f"the mesh ({shape}) needs {need} devices but there are {len(devices)}; make mesh.* smaller")
  if need < len(devices) and jax.process_count() > 1:
    raise ConfigError(f"the mesh takes {need} of {len(devices)} devices; with several hosts it must take all")
  grid = np.asarray(devices[:need]).reshape(tuple(sizes.values()))
  if need == len(jax.devices()) and devices[0].platform == "tpu":
    # On a TPU slice neighbours in the mesh should be neighbours in the torus.
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def target_of(mesh: Mesh) -> str:
  """The chip a mesh's programs are compiled for, as in `jaxllm.kernels.backends.TARGETS`."""
  from jaxllm.kernels.backends import target_from_device_kind

  device = mesh.devices.flat[0]
  return target_from_device_kind(device.platform, device.device_kind)

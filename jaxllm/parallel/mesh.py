"""The device mesh: one vocabulary of axes, any of which may be 1."""

import collections
import logging
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxllm.base.chips import chip_of
from jaxllm.base.errors import ConfigError
from jaxllm.parallel.config import AXES, SLOW_AXES, MeshConfig

log = logging.getLogger("jaxllm")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges the devices as `config` says, outermost axis first.

  Devices that lie close to each other come to stand beside each other on the inner axes: neighbours of a TPU's
  torus, GPUs of one host. Where a job has several slices (or hosts of GPUs), the outermost axes cross them.

  Args:
    config: the size of each axis; -1 takes the devices that the others leave over.
    devices: by default all devices of all hosts; a mesh smaller than their number takes the first ones
      (one host only).

  Raises:
    ConfigError: the axes need more devices than there are, do not divide them, or cannot be laid out on them.
  """
  devices = list(jax.devices() if devices is None else devices)
  if config.stage > 1:
    raise ConfigError(f"mesh.stage is {config.stage}, but nothing is split along it yet; set it to 1")
  sizes = _sizes(config, len(devices))
  need = math.prod(sizes.values())
  if need > len(devices):
    raise ConfigError(
      f"the mesh ({_text(sizes)}) needs {need} devices but there are {len(devices)}; make mesh.* smaller"
    )
  if need < len(devices) and jax.process_count() > 1:
    raise ConfigError(f"the mesh takes {need} of {len(devices)} devices; with several hosts it must take all")
  if need < len(devices) or devices[0].platform not in ("tpu", "gpu", "cuda", "rocm"):
    grid = np.asarray(devices[:need]).reshape(tuple(sizes.values()))
  else:
    grid = _near_together(sizes, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, count: int) -> dict[str, int]:
  """The size of every axis, where one of them may take what the others leave over."""
  sizes = {axis: getattr(config, axis) for axis in AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = count // fixed
      if sizes[axis] * fixed != count:
        raise ConfigError(
          f"the mesh axes other than {axis} take {fixed} devices, which does not divide the {count} "
          f"there are; change mesh.* or set mesh.{axis}"
        )
  return sizes


def _near_together(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
  """All devices in an array of these sizes, neighbours on inner axes joined by the fastest links."""
  on_tpu = devices[0].platform == "tpu"
  by_process = not on_tpu and any(getattr(device, "slice_index", None) is None for device in devices)
  islands = collections.Counter(d.process_index if by_process else getattr(d, "slice_index", 0) for d in devices)
  crossing = dict.fromkeys(sizes, 1)
  if len(islands) > 1:
    what = "slices" if on_tpu else "hosts"
    crossing = _crossing(sizes, len(islands))
    fast = {axis: ways for axis, ways in crossing.items() if ways > 1 and axis not in SLOW_AXES}
    if on_tpu and fast:
      raise ConfigError(
        f"mesh.{next(iter(fast))} would cross the {len(islands)} slices, whose links are slow; give "
        f"mesh.{' or mesh.'.join(SLOW_AXES)} a size that {len(islands)} divides"
      )
    if len(set(islands.values())) > 1:
      raise ConfigError(f"the {what} have {', '.join(map(str, islands.values()))} devices; a mesh needs equally many")
    log.info("mesh: %s across %d %s", _text(crossing), len(islands), what)
    if fast:
      log.warning("mesh.%s crosses hosts, whose links are slower than a host's own", next(iter(fast)))

  def arrange(split: bool) -> np.ndarray:
    if len(islands) == 1:
      return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=split)
    return mesh_utils.create_hybrid_device_mesh(
      tuple(sizes[axis] // crossing[axis] for axis in sizes),
      tuple(crossing.values()),
      devices,
      process_is_granule=by_process,
      allow_split_physical_axes=split,
    )

  try:
    try:
      return arrange(False)
    except NotImplementedError:  # each axis of the mesh on whole axes of the torus has the best bandwidth
      grid = arrange(True)
      log.info("mesh: %s do not fit whole axes of the torus and share some, with less bandwidth", _text(sizes))
      return grid
  except (NotImplementedError, ValueError, AssertionError) as error:
    raise ConfigError(
      f"the mesh ({_text(sizes)}) cannot be laid out on these {len(devices)} {devices[0].device_kind} devices: "
      f"{(str(error) or type(error).__name__).splitlines()[0]}"
    ) from error


def _crossing(sizes: Mapping[str, int], islands: int) -> dict[str, int]:
  """How many ways each axis goes from island to island: the outermost take as much as they can."""
  crossing = {}
  for axis, size in sizes.items():
    crossing[axis] = math.gcd(size, islands)
    islands //= crossing[axis]
  return crossing


def _text(sizes: Mapping[str, int]) -> str:
  return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def target_of(mesh: Mesh) -> str:
  """The chip that a mesh's programs are compiled for, a name of `jaxllm.base.chips.CHIPS`."""
  device = mesh.devices.flat[0]
  return chip_of(device.platform, device.device_kind).name

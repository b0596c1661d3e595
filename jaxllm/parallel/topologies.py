"""Devices that are not here: meshes of chips to compile for, ahead of time, on any machine.

    mesh = tpu_mesh("v5p:4x4x4")          # needs libtpu, no TPU
    mesh = gpu_mesh("h100", 8)            # needs jax's CUDA plugin, no GPU
    avals = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(step).trace(avals).lower(lowering_platforms=(platform,)).compile()

Chip facts are of openxla/xla's `backends/gpu/target_config/specs`.
"""

import importlib.util
import os

import jax
import numpy as np
from jax.experimental import topologies

from jaxllm.base.chips import CHIPS
from jaxllm.base.errors import UserError

# Smallest topology of one host for each chip; a mesh of one chip takes its first device.
TPU_HOSTS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7": "tpu7x:2x2x1"}

_HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory}
  shared_memory_per_block_optin: 232448 cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
  device_description_str: "{name}" """
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


def tpu_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """TPU devices to compile for: of one or more slices of `topology` ("v5e:4x4"), or one chip ("v5e").

  Raises:
    UserError: libtpu is not installed.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("compiling for TPUs needs libtpu: pip install 'jaxllm[tpu]'")
  # Else it looks for its metadata server, and lets one process at a time load it.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  several = {"num_slices": slices} if slices > 1 else {}
  described = topologies.get_topology_desc(TPU_HOSTS.get(topology, topology), platform="tpu", **several)
  return list(described.devices[:1] if topology in TPU_HOSTS else described.devices)


def tpu_mesh(topology: str, shape: tuple[int, ...] = (), axes: tuple[str, ...] = ()) -> jax.sharding.Mesh:
  """A mesh of `tpu_devices`, in their order; `mesh.make_mesh` lays them out as a run does.

  Raises:
    UserError: libtpu is not installed.
  """
  return jax.sharding.Mesh(np.array(tpu_devices(topology)).reshape(shape or (-1,)), axes or ("data",))


def gpu_mesh(chip: str, count: int = 1) -> jax.sharding.Mesh:
  """A mesh of one host's GPUs to compile for.

  Raises:
    UserError: jax's CUDA plugin is not installed, or the chip is none of GPUS.
  """
  if chip not in GPUS:
    raise UserError(f"no facts of the chip {chip!r}; choose one of {', '.join(GPUS)}")
  if not any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13)):
    raise UserError("compiling for GPUs needs jax's CUDA plugin: pip install 'jaxllm[cuda]'")
  facts = CHIPS[chip]
  config = _HOPPER.format(bandwidth=int(facts.bandwidth), memory=facts.memory, name=GPUS[chip])
  topology = topologies.get_topology_desc(
    platform="cuda", topology_name="", target_config=config, topology=f"1x1x{count}"
  )
  return jax.sharding.Mesh(np.array(topology.devices), ("data",))

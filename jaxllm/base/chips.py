"""What is known of chips: one table, which kernels, FLOP counts and topologies read.

A target is the name of a chip that a program is compiled for. It comes from the mesh or the config, never from the
machine that compiles.
"""

import dataclasses
from typing import Literal

Family = Literal["cpu", "hopper", "gpu", "tpu"]


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one JAX device can do at best: dense bfloat16 FLOP/s (no sparsity), bytes/s of its memory, its bytes."""

  name: str
  family: Family  # whose kernels it runs
  flops: float | None = None
  bandwidth: float | None = None
  memory: int | None = None
  kinds: tuple[str, ...] = ()  # parts of the `jax.Device.device_kind` that mean it, in lower case


# Peaks: NVIDIA's data sheets print twice the dense figure ("with sparsity"). A100 data sheet (SXM 80 GB); H100 and H200
# data sheets (SXM; H100 PCIe apart); HGX B200 data sheet, an eighth of it (18 PFLOP/s dense, 64 TB/s). TPUs:
# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. JAX sees a v7 chip as two devices, so its row is half a chip
# (2307 TFLOP/s, 7380 GB/s, 192 GB). Memory of H100 and H200: openxla/xla's `backends/gpu/target_config/specs`.
# Of two rows that a device's kind fits, the first is meant.
_ROWS = (
  Chip("cpu", "cpu"),
  Chip("h100_pcie", "hopper", 756e12, 2000e9, None, ("h100 pcie",)),
  Chip("h100", "hopper", 989.4e12, 3352.32e9, 84942979072, ("h100",)),
  Chip("h200", "hopper", 989.4e12, 4814.2592e9, 150754820096, ("h200",)),
  Chip("a100", "gpu", 312e12, 2039e9, None, ("a100",)),
  Chip("b200", "gpu", 2250e12, 8000e9, None, ("b200",)),
  Chip("gpu", "gpu"),  # some other GPU
  Chip("v4i", "tpu", None, None, None, ("tpu v4 lite",)),
  Chip("v4", "tpu", 275e12, 1228e9, 32 * 2**30, ("tpu v4",)),
  Chip("v5e", "tpu", 197e12, 819e9, 16 * 2**30, ("tpu v5 lite", "tpu v5e")),
  Chip("v5p", "tpu", 459e12, 2765e9, 95 * 2**30, ("tpu v5",)),
  Chip("v6e", "tpu", 918e12, 1638e9, 32 * 2**30, ("tpu v6",)),
  Chip("v7", "tpu", 2307e12 / 2, 7380e9 / 2, 96 * 2**30, ("tpu7x", "tpu v7")),
  Chip("tpu", "tpu"),  # some other TPU
)
CHIPS = {chip.name: chip for chip in _ROWS}
TARGETS: dict[str, Family] = {chip.name: chip.family for chip in _ROWS}


def chip_of(platform: str, device_kind: str) -> Chip:
  """The chip behind a `jax.Device`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite"; its peaks may be unknown.

  A CPU's always are: what one measures there depends on the product and on who else computes, and a peak that can be
  beaten is none.
  """
  if platform == "cpu":
    return CHIPS["cpu"]
  on_gpu = platform in ("gpu", "cuda", "rocm")
  kind = device_kind.lower()
  fits = (chip for chip in _ROWS if (chip.family != "tpu") == on_gpu and any(part in kind for part in chip.kinds))
  return next(fits, CHIPS["gpu" if on_gpu else "tpu"])

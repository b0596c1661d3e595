"""The kernels at the shapes that models have: what tools/bench_kernels.py times and tools/machine_code.py compiles.

A case knows its inputs, its floating-point operations and bytes, how our function is called with a backend's name, who
else computes the same, and the answer in float64 for a part of it. Its tags say what it is there for.
"""

import dataclasses

from kernel_cases import flash, grouped, head_loss, paged, peers, quantized
from kernel_cases.case import SDS, Case, installed, tagged
from kernel_cases.flash import attention
from kernel_cases.grouped import grouped_matmul
from kernel_cases.head_loss import cross_entropy
from kernel_cases.paged import paged_attention
from kernel_cases.quantized import FORMATS, quantized_matmul

__all__ = [
  "FORMATS",
  "SDS",
  "Case",
  "attention",
  "cases",
  "cross_entropy",
  "grouped_matmul",
  "installed",
  "paged_attention",
  "quantized_matmul",
  "tagged",
]


def cases(family: str) -> list[Case]:
  """The cases of a family of chips ("cpu", "hopper", "gpu", "tpu"), with the peers that can be there."""
  elsewhere = {name for other, names in peers.KERNELS.items() if other != family for name in names}
  found = [case for module in (flash, head_loss, quantized, paged, grouped) for case in module.cases(family)]
  here = lambda others: {name: peer for name, peer in others.items() if name not in elsewhere}  # noqa: E731
  return [dataclasses.replace(case, others=here(case.others)) for case in found]

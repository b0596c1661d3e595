"""Paged attention of the batch-invariant mode: the CPU's, whose sums depend on a token's own place only."""

import functools

from jaxllm.kernels.paged import cpu
from jaxllm.kernels.paged.cpu import refuses, tile_shape

__all__ = ["forward", "refuses", "tile_shape"]

forward = functools.partial(cpu.forward, round=False)  # a single token's keys and values are not

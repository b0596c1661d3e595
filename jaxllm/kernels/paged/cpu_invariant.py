"""Paged attention of the batch-invariant mode: the CPU's, whose sums depend on a token's own place only."""

from jaxllm.kernels.paged.cpu import forward, refuses, tile_shape

__all__ = ["forward", "refuses", "tile_shape"]

"""The hot path: one public function per kernel, each with named backends (`backends`)."""

from jaxllm.kernels.attention import Visibility, flash_attention
from jaxllm.kernels.head_loss import CrossEntropy, cross_entropy
from jaxllm.kernels.paged import KVPages, paged_attention, write_pages

__all__ = [
  "CrossEntropy",
  "KVPages",
  "Visibility",
  "cross_entropy",
  "flash_attention",
  "paged_attention",
  "write_pages",
]

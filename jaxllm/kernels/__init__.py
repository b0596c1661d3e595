"""The hot path: one public function per kernel, each with named backends (`backends`)."""

from jaxllm.kernels.attention import Visibility, flash_attention
from jaxllm.kernels.grouped import grouped_matmul
from jaxllm.kernels.head_loss import CrossEntropy, cross_entropy

__all__ = ["CrossEntropy", "Visibility", "cross_entropy", "flash_attention", "grouped_matmul"]

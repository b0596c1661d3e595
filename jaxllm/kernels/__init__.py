"""The hot path: one public function per kernel, each with named backends (`backends`)."""

from jaxllm.kernels.attention import Visibility, flash_attention
from jaxllm.kernels.grouped import grouped_matmul
from jaxllm.kernels.head_loss import (
  CrossEntropy,
  cross_entropy,
  cross_entropy_gradients,
  token_log_probs,
  token_log_probs_and_slopes,
  token_log_probs_gradients,
)
from jaxllm.kernels.paged import KVPages, paged_attention, write_pages
from jaxllm.kernels.quantized import QuantizedWeight, dequantize, quantize, quantized_matmul

__all__ = [
  "CrossEntropy",
  "KVPages",
  "QuantizedWeight",
  "Visibility",
  "cross_entropy",
  "cross_entropy_gradients",
  "dequantize",
  "flash_attention",
  "grouped_matmul",
  "paged_attention",
  "quantize",
  "quantized_matmul",
  "token_log_probs",
  "token_log_probs_and_slopes",
  "token_log_probs_gradients",
  "write_pages",
]

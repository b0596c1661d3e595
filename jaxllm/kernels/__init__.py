"""The hot path: one public function per kernel, each with named backends (`backends`)."""

from jaxllm.kernels.attention import Visibility, flash_attention
from jaxllm.kernels.head_loss import CrossEntropy, cross_entropy, token_log_probs

__all__ = ["CrossEntropy", "Visibility", "cross_entropy", "flash_attention", "token_log_probs"]

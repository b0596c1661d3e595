"""The language-model head and its loss in one: cross-entropy that never holds all logits."""

from jaxllm.kernels.head_loss.api import (
  CrossEntropy,
  cross_entropy,
  cross_entropy_gradients,
  token_log_probs,
  token_log_probs_and_slopes,
  token_log_probs_gradients,
)

__all__ = [
  "CrossEntropy",
  "cross_entropy",
  "cross_entropy_gradients",
  "token_log_probs",
  "token_log_probs_and_slopes",
  "token_log_probs_gradients",
]

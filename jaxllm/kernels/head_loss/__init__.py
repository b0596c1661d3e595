"""The language-model head and its loss in one: cross-entropy that never holds all logits."""

from jaxllm.kernels.head_loss.api import CrossEntropy, cross_entropy, token_log_probs

__all__ = ["CrossEntropy", "cross_entropy", "token_log_probs"]

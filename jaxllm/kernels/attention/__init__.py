"""Attention: one function (`api`), its options, and a file for each backend."""

from jaxllm.kernels.attention.api import flash_attention
from jaxllm.kernels.attention.options import Options, Visibility

__all__ = ["Options", "Visibility", "flash_attention"]

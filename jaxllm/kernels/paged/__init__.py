"""Attention to a paged key/value cache: one function (`api`), the cache (`pages`), and a file for each backend."""

from jaxllm.kernels.paged.api import paged_attention
from jaxllm.kernels.paged.pages import KVPages, write_pages

__all__ = ["KVPages", "paged_attention", "write_pages"]

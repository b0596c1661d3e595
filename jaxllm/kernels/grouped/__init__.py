"""Rows sorted by expert times their expert's matrix: one function (`api`), and a file for each backend."""

from jaxllm.kernels.grouped.api import grouped_matmul

__all__ = ["grouped_matmul"]

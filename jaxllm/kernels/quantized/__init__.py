"""Products with quantized weights: the weight (`weights`), one function (`api`), and a file for each backend."""

from jaxllm.kernels.quantized.api import quantized_matmul
from jaxllm.kernels.quantized.weights import QuantizedWeight, dequantize, from_codes, part_axes, quantize, rows

__all__ = ["QuantizedWeight", "dequantize", "from_codes", "part_axes", "quantize", "quantized_matmul", "rows"]

"""What tools/bench_kernels.py runs by default: cases, checks, and what the kernels are asked for."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kernel_cases
from kernel_cases import Case, attention, cross_entropy, paged_attention, quantized_matmul
from kernel_checks import checks

__all__ = ["Target", "cases", "checks", "targets"]


@dataclasses.dataclass(frozen=True)
class Target:
  """What a kernel is asked for. figure: (milliseconds of a case's side, temporary bytes of one, ceilings) -> number."""

  name: str
  cases: tuple[Case, ...]
  sides: tuple[str, ...]
  asked: float
  figure: Callable
  at_most: bool = False


OURS, CUDNN = "jaxllm mosaic_gpu", "jax.nn cudnn"
FORWARD, BACKWARD = (attention(8, 4096, 32, 8, 128, backward=backward) for backward in (False, True))
HEAD = cross_entropy(8192, 4096, 128256)


def _forward(side):
  return lambda ms, temp, limits: FORWARD.flops / ms(FORWARD, side) / 1e9


def _backward(side):
  """By the usual count, 2.5 times the forward pass, over the time that the gradients add to it."""
  return lambda ms, temp, limits: 2.5 * FORWARD.flops / (ms(BACKWARD, side) - ms(FORWARD, side)) / 1e9


def _decoding(dtype):
  case = paged_attention(64, 8192, 32, 8, 128, dtype=dtype)
  figure = lambda ms, temp, limits: 100 * case.bytes / (ms(case, OURS) * 1e-3) / limits["bytes/s"]  # noqa: E731
  return Target(f"paged decoding, {dtype}, % of a copy's bandwidth", (case,), (OURS,), 80, figure)


def _few_tokens(M, format, group_size, asked):
  case = quantized_matmul(M, 4096, 14336, format, group_size=group_size)
  name = f"{format} weights, {M} tokens, times faster than dense bfloat16"
  figure = lambda ms, temp, limits: ms(case, "dense bfloat16") / ms(case, OURS)  # noqa: E731
  return Target(name, (case,), (OURS, "dense bfloat16"), asked, figure)


def _head(side):
  sides = (side, "all logits")
  time = lambda ms, temp, limits: ms(HEAD, side) / ms(HEAD, "all logits")  # noqa: E731
  memory = lambda ms, temp, limits: temp(HEAD, side) / temp(HEAD, "all logits")  # noqa: E731
  name = f"cross-entropy, V 128k, {side.removeprefix('jaxllm ')}"
  return (
    Target(f"{name}: time over that of all logits", (HEAD,), sides, 1.1, time, at_most=True),
    Target(f"{name}: memory over that of all logits", (HEAD,), sides, 0.1, memory, at_most=True),
  )


HOPPER = (
  Target("attention, causal, H128, 4k, TFLOP/s", (FORWARD,), (OURS,), 450, _forward(OURS)),
  Target("attention, the same by cuDNN, TFLOP/s", (FORWARD,), (CUDNN,), 450, _forward(CUDNN)),
  Target("attention backward, causal, H128, 4k, TFLOP/s", (FORWARD, BACKWARD), (OURS,), 380, _backward(OURS)),
  Target("attention backward, the same by cuDNN, TFLOP/s", (FORWARD, BACKWARD), (CUDNN,), 380, _backward(CUDNN)),
  *(_decoding(dtype) for dtype in ("bfloat16", "int8")),
  *(_few_tokens(M, "int4", 128, 3.0) for M in (1, 4, 8, 16)),
  *(_few_tokens(M, "int8", None, 1.8) for M in (1, 4, 8, 16)),
  *_head(OURS),
  *_head("jaxllm xla"),
)


def targets(family: str) -> tuple[Target, ...]:
  """What a family of chips is asked for; nothing where nobody said."""
  return HOPPER if family == "hopper" else ()


def cases(family: str) -> list[Case]:
  """All cases, those of the targets and, on a CPU, of decoding too."""
  found = [*(case for target in targets(family) for case in target.cases), *kernel_cases.cases(family)]
  if family == "cpu":
    for B in (1, 8):
      decoding = (attention(B, 1, 32, 8, 128, S=4096, causal=False, dtype=d) for d in ("float32", "bfloat16"))
      found += decoding
      found += [paged_attention(B, 4096, 32, 8, 128, dtype=dtype) for dtype in ("bfloat16", "int8")]
  return list({(case.op, case.name): case for case in found}.values())

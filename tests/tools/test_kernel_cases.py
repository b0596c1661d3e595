"""The cases of the benchmarks: the float64 answers that they bring, at shapes small enough to compute everything."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import kernel_cases
from kernel_cases import attention, cross_entropy, grouped_matmul, paged_attention, quantized_matmul

F32 = {"dtype": jnp.float32}
OPTIONS = [{}, {"causal": False}, {"window": 32}, {"window": 32, "sink_tokens": 4}, {"segments": 2}, {"prefix": 40}]
OPTIONS += [{"softcap": 2.0}, {"alibi": True}, {"sinks": True}, {"S": 160}]
CASES = [
  *(attention(2, 96, 4, 2, 16, **F32, **o, backward=b) for o in OPTIONS for b in (False, True)),
  attention(2, 96, 4, 2, 16, **F32, lse=True, sinks=True),
  *(cross_entropy(48, 16, 200, **F32, **o) for o in ({"z_loss": 0.01}, {"softcap": 2.0}, {"label_smoothing": 0.1})),
  *(cross_entropy(48, 16, 200, **F32, transposed=True, tokens=t, backward=b) for t in (0, 1) for b in (0, 1)),
  *(quantized_matmul(9, 256, 64, f, group_size=g, **F32) for f, g in kernel_cases.FORMATS),
  *(quantized_matmul(9, 256, 64, "int4", group_size=64, asymmetric=True, backward=b, **F32) for b in (False, True)),
  *(
    paged_attention(3, 100, 4, 2, 16, page_size=16, query_dtype=jnp.float32, **{"dtype": "float32"} | o)
    for o in (
      *({}, {"dtype": "int8"}, {"new": 5}, {"new": 5, "prefills": 1, "window": 20}, {"softcap": 2.0}, {"alibi": True}),
      {"sinks": True, "lse": True},
    )
  ),
  *(
    grouped_matmul(96, 4, 32, 48, **F32, gradient=g, groups=s)
    for g in (None, "x", "weights")
    for s in ("skewed", "empty")
  ),
]


def error(pair):
  got, want = pair
  return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_oracle(case):
  """The plain form gives what the case says is right, and another seed's result is wrong by far."""
  inputs, others = case.values(0), case.values(1)
  run = jax.jit(case.ours("xla", "cpu"))
  assert jax.tree.structure(inputs) == jax.tree.structure(case.inputs)
  assert error(case.oracle(inputs, run(*inputs))) < 3e-5
  assert error(case.oracle(inputs, run(*others))) > 0.01


@pytest.mark.parametrize("family", ["cpu", "hopper", "tpu"])
def test_cases_have_names_and_tags(family):
  cases = kernel_cases.cases(family)
  assert len({(case.op, case.name) for case in cases}) == len(cases)
  assert all(case.tags <= {"target", "shape", "option", "values"} and case.tags for case in cases)
  targets = {case.op for case in cases if "target" in case.tags}
  assert targets >= {"attention", "attention backward", "cross_entropy", "quantized_matmul", "paged_attention"}

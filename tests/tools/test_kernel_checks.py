"""kernel_checks.py: what counts as right, and one check of each kind on the plain forms."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import kernel_checks
import machine_code


def test_the_share_of_the_tolerance_that_an_error_takes():
  want = np.array([4.0, -np.inf, 0.0])
  off = want + [kernel_checks.TOLERANCE * 2, 0, 0]
  assert kernel_checks.share((want,), (want,)) == 0
  assert kernel_checks.share((off,), (want,)) == pytest.approx(0.5)
  for poison in (np.nan, np.inf):
    assert kernel_checks.share((np.array([4.0, -np.inf, poison]),), (want,)) == float("inf")
  assert kernel_checks.share((np.array([4.0, 0.0, 0.0]),), (want,)) == float("inf")
  assert kernel_checks.share((want[:2],), (want,)) == float("inf")


CHEAP = {
  "attention": "one query",
  "quantized_matmul": "int8 M130 768x264",
  "paged_attention": "decoding, float16, softcap",
  "cross_entropy": "float32 head",
  "grouped_matmul": "no rows",
}


@pytest.mark.parametrize("op", CHEAP)
def test_plain_forms_are_right(op, monkeypatch):
  monkeypatch.setattr(kernel_checks, "SEEDS", 1)
  monkeypatch.setattr(kernel_checks, "REPEATS", 1)
  every = kernel_checks.checks("h100")
  assert len({(check.op, check.name) for check in every}) == len(every)
  (check,) = (check for check in every if (check.op, check.name) == (op, CHEAP[op]))
  outcome = check.outcome("xla", "cpu")
  assert outcome["right"] and outcome["share of tolerance"] < 0.5


def test_what_is_quick_comes_first_and_covers_every_kernel():
  every = kernel_checks.checks("h100")
  quick = [check.quick for check in every]
  assert quick == sorted(quick, reverse=True)
  assert {check.op for check in every if check.quick} == set(CHEAP)


@pytest.mark.slow
@pytest.mark.parametrize("op", CHEAP)
def test_every_check_lowers_for_an_h100(op):
  """Mosaic GPU refuses copies there that its emulator makes."""
  pytest.importorskip("jax", minversion="0.11")
  mesh = machine_code.abstract_mesh(machine_code.gpu_mesh("h100"), "cuda")
  with jax.sharding.use_abstract_mesh(mesh):  # kernels ask it for the number of multiprocessors
    for check in (check for check in kernel_checks.checks("h100") if check.op == op):
      function = check.function("mosaic_gpu", "h100")
      jax.jit(function).trace(*check.draw(0)[0]).lower(lowering_platforms=("cuda",))

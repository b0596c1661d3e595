"""How bench_worker.py takes times on a GPU, with jax's profiler replaced: every way in which it can fail."""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import bench_worker
from kernel_cases import paged_attention

SETS = [(jnp.full(4, i),) for i in range(3)]


@pytest.fixture
def profiled(monkeypatch):
  """`timings` as on a GPU; measure(f, iterations) is what the test says. Returns the inputs that calls have seen."""
  seen = []

  def use(answer):
    def measure(f, *, iterations=1):
      def run():
        f()  # jax's warms up
        outs = [f() for _ in range(iterations)]
        return outs[0], answer(iterations)

      return run

    profiler = types.SimpleNamespace(measure=measure)
    monkeypatch.setitem(sys.modules, "jax.experimental.mosaic.gpu", types.SimpleNamespace(profiler=profiler))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def function(x):
      seen.append(int(x[0]))
      return x

    return bench_worker.timings(function, SETS, 6)

  return use, seen


def test_one_time_a_call_and_inputs_in_turn(profiled):
  use, seen = profiled
  times, how = use(lambda n: [0.1 * (i + 1) for i in range(n)])
  assert how == "CUPTI" and np.allclose(times, 0.1 * np.arange(1, 7))
  assert all(a != b for a, b in zip(seen, seen[1:]))  # never the same inputs twice in a row


def test_calls_of_differing_kernels_one_by_one(profiled):
  def answer(n):
    if n > 1:
      raise RuntimeError("Kernel names are not consistent across iterations")
    return 0.25

  assert profiled[0](answer) == ([0.25] * 6, "CUPTI, call by call")


@pytest.mark.parametrize("answer", [lambda n: None, lambda n: (_ for _ in ()).throw(RuntimeError("no CUPTI\nhere"))])
def test_without_cupti_the_clock_and_a_note(profiled, answer):
  times, how = profiled[0](answer)
  assert len(times) == 6 and min(times) > 0
  assert how.startswith("clock, back to back, because of CUPTI: ") and "\n" not in how


def test_results_that_would_fill_the_memory_are_measured_in_parts(profiled, monkeypatch):
  asked = []
  monkeypatch.setattr(bench_worker, "KEPT", 2 * SETS[0][0].nbytes)
  times, _ = profiled[0](lambda n: asked.append(n) or [1.0] * n)
  assert len(times) == 6 and max(asked) == 2


def test_jax_takes_turns_for_a_jitted_function():
  from jax._src import stages

  turns = bench_worker.Turns(jax.jit(lambda x: x + 1), SETS)
  assert isinstance(turns, stages.Wrapped)  # else its profiler would trace them once, and cycle through nothing
  assert [int(turns()[0]) for _ in range(4)] == [1, 2, 3, 1]


def test_inputs_come_from_the_device_in_the_dtypes_of_the_case():
  case = paged_attention(2, 128, 4, 2, 32, dtype="int8")
  drawn = bench_worker.inputs_of(case, 1)
  like = lambda x: (x.shape, x.dtype)  # noqa: E731
  assert jax.tree.map(like, drawn) == jax.tree.map(like, case.inputs)
  assert drawn[1].keys.std() > 20 and (drawn[1].key_scales >= 0).all()
  assert bench_worker.copies(case) == 16 and bench_worker.copies(paged_attention(64, 8192, 32, 8, 128)) == 1

"""tune_kernels.py: what counts as a win, candidates that exist, and a sweep whose child dies at times."""

import dataclasses
import importlib
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import tune_kernels
from kernel_cases import attention

ROOMS = {
  "attention_forward": ("attention", {"pallas_tpu": "pallas_tpu_call"}),
  "attention_backward": ("attention", {"mosaic_gpu": "mosaic_gpu_backward", "pallas_tpu": "pallas_tpu_call"}),
  "cross_entropy": ("head_loss", {}),
  "grouped_matmul": ("grouped", {}),
  "grouped_gradient": ("grouped", {}),
  "quantized_matmul": ("quantized", {}),
  "paged_attention": ("paged", {}),
}


@pytest.mark.parametrize("family", tune_kernels.CANDIDATES)
def test_candidates_are_fields_of_the_kernels_tiles(family):
  if family != "cpu":
    pytest.importorskip("jax", minversion="0.11")
  for op, found in tune_kernels.CANDIDATES[family].items():
    room, files = ROOMS[op.removesuffix("_xla") + ("_forward" if op == "attention_xla" else "")]
    module = files.get(found.backend, "reference" if found.backend == "xla" else found.backend)
    tiles = importlib.import_module(f"jaxllm.kernels.{room}.{module}").Tiles
    assert set(found.fields) <= {field.name for field in dataclasses.fields(tiles)}, op


def test_the_winner_wins_over_all_cases_and_runs_in_all():
  times = {"a": {"{}": 1.0, "x": 0.5, "y": 0.8, "z": 0.1}, "b": {"{}": 1.0, "x": 2.1, "y": 0.9}}
  assert tune_kernels.winner(times) == "y"
  assert tune_kernels.winner({"a": {"{}": 1.0, "x": 0.98}}) is None


def test_a_duel_is_won_in_nearly_every_round_and_nowhere_lost():
  assert tune_kernels.robust({"a": [0.9] * 9, "b": [1.01] * 9})
  assert not tune_kernels.robust({"a": [0.9] * 6 + [1.1] * 3})
  assert not tune_kernels.robust({"a": [0.5] * 9, "b": [1.1] * 9})
  assert not tune_kernels.robust({"a": [0.98] * 9})
  assert not tune_kernels.robust({"a": [0.5] * 9, "b": [float("inf")]})


def test_a_sweep_goes_on_when_candidates_fail():
  case = attention(1, 64, 2, 2, 16, dtype=jnp.float32)
  found = tune_kernels.Candidates(("attention",), "xla", {"queries": (8, 16, 32)})
  ms = {8: None, 16: 0.5, 32: 0.9, None: 1.0}

  def ask(job):
    queries = job["candidate"].get("queries")
    if ms[queries] is None:
      return {"out": "killed by SIGABRT"}
    return (
      {"key": "dtype=float32", "ratios": [ms[queries]] * 9}
      if "duel" in job
      else {"key": "dtype=float32", "ms": ms[queries]}
    )

  assert tune_kernels.tune("attention_xla", found, [case], ask) == {"dtype=float32": {"queries": 16}}


def test_the_child_compares_results_and_names_the_facts(monkeypatch):
  case = attention(1, 64, 2, 2, 16, dtype=jnp.float32)
  monkeypatch.setattr(tune_kernels, "cases", lambda family: [case])
  monkeypatch.setattr(tune_kernels, "copies", lambda case: 1)
  trier = tune_kernels.Trier("cpu", "cpu", 2)
  job = {"op": "attention_xla", "cases": "attention", "backend": "xla", "case": case.name, "candidate": {"queries": 16}}
  answer = trier.handle(job)
  assert answer["key"] == "dtype=float32" and answer["ms"] > 0
  assert len(trier.handle(job | {"duel": True})["ratios"]) == tune_kernels.ROUNDS
  assert "out" in trier.handle(job | {"candidate": {"nothing": 1}})
  assert "no such tiles" in trier.handle(job | {"op": "another"})["out"]

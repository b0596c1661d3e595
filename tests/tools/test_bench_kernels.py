"""bench_kernels.py on a table whose sides crash, hang, raise and lie: nothing else is lost, and nothing passes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import bench_kernels

ROOT = Path(__file__).parents[2]


def bench(out, *flags):
  command = [sys.executable, "tools/bench_kernels.py", "--table=tests/tools/fake_table.py", f"--out={out}", "--calls=3"]
  run = subprocess.run(
    [*command, "--timeout=8", *flags],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  return json.loads(out.with_suffix(".json").read_text()), run.stdout


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A run that is cut short after the first target's rows, and the same command again, to the end."""
  out = tmp_path_factory.mktemp("bench") / "table"
  quick, said = bench(out, "--quick")
  return out, quick, said, *bench(out)


def rows(record):
  return {(row.get("case", row.get("name")), row.get("side", row.get("backend"))): row for row in record["rows"]}


def test_quick_is_what_the_targets_need(first):
  _, quick, said, *_ = first
  checked = {(name, backend) for name in ("right", "wrong") for backend in ("cpu", "cpu_invariant")}
  assert set(rows(quick)) == {*checked, ("plain", "jaxllm xla"), ("plain", "twice")}
  verdicts = {t["target"]: t["verdict"] for t in quick["targets"]}
  assert verdicts == {"met": "PASS", "missed": "MISSED", "unknown": "NO FIGURE"}
  assert "PASS      met" in said and "MISSED    missed" in said


def test_the_second_run_goes_on_and_loses_nobody(first):
  out, quick, _, record, said = first
  assert "goes on from 6 rows" in said
  assert record["rows"][:6] == quick["rows"] and record["ceilings"] == quick["ceilings"]
  found = rows(record)
  assert "SIGABRT" in found["bad", "dies"]["failed"]
  assert "no answer in 8 s" in found["bad", "hangs"]["failed"]
  assert found["bad", "raises"]["failed"].endswith("RESOURCE_EXHAUSTED: no memory")
  for side in (("bad", "jaxllm xla"), ("bad", "late"), ("plain", "jaxllm xla"), ("plain", "wrong")):
    assert len(found[side]["ms"]) == 2 and min(found[side]["ms"]) > 0
  assert out.with_suffix(".png").stat().st_size > 1000
  assert {"jax", "python"} <= set(record["versions"]) and record["commit"] and record["device"]


def test_what_is_wrong_is_called_so(first):
  _, _, _, record, said = first
  found = rows(record)
  assert found["right", "cpu"]["right"] and not found["wrong", "cpu"]["right"]
  assert found["plain", "jaxllm unsteady"]["same again"] is False
  assert 0.09 < found["plain", "wrong"]["errors"]["float32"] < 0.11
  summary = said[said.index(" rows, ") :]
  assert all(name in summary for name in ("dies", "hangs", "raises", "WRONG, error 0.1", "OTHER BITS"))
  assert "late" not in summary


def test_only_rows_of_the_same_sources_and_device_are_kept(first):
  out, _, _, record, _ = first
  same = {name: record[name] for name in ("sources", "device", "versions", "calls")}
  assert bench_kernels.earlier(out.with_suffix(".json"), same)["rows"] == record["rows"]
  for name in same:
    assert not bench_kernels.earlier(out.with_suffix(".json"), same | {name: "another"})["rows"]

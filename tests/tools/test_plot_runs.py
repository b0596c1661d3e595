"""tools/plot_runs.py, run as a person runs it, and its arithmetic."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / "tools" / "plot_runs.py"
spec = importlib.util.spec_from_file_location("plot_runs", TOOL)
plot_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot_runs)


def write_run(path, scale=1.0, steps=400):
  path.mkdir(parents=True)
  rng = np.random.default_rng(int(scale * 10))
  with (path / "metrics.jsonl").open("w") as file:
    for step in range(10, steps * 10, 10):
      loss = 2 + 8 * np.exp(-step * scale / 800) + rng.normal() * 0.15
      line = {"step": step, "loss": None if step == 500 else loss, "tokens": step * 4096, "step_time_s": 0.5}
      file.write(json.dumps(line) + "\n")
      if step % 500 == 0:
        file.write(json.dumps({"step": step, "eval/loss": loss + 0.1}) + "\n")
  return path


def run_tool(*arguments, cwd):
  root = str(TOOL.parents[1])
  return subprocess.run(
    [sys.executable, str(TOOL), *map(str, arguments)],
    env=os.environ | {"PYTHONPATH": root},
    cwd=cwd,
    text=True,
    capture_output=True,
  )


def test_a_picture_of_two_runs(tmp_path):
  a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", 2.0)
  result = run_tool(a, b, "--metrics", "loss,eval/loss", "--x", "tokens", "--out", "out/curves.png", cwd=tmp_path)
  assert (result.returncode, result.stderr, result.stdout) == (0, "", "out/curves.png\n")
  import matplotlib.image

  image = matplotlib.image.imread(tmp_path / "out" / "curves.png")
  height, width = image.shape[:2]
  assert (height, width) == (660, 1920)
  for half in (image[:, : width // 2], image[:, width // 2 :]):  # both panels show both runs' colours
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
      assert (np.abs(half[..., :3] * 255 - color).max(axis=-1) < 3).sum() > 500


@pytest.mark.parametrize(
  "prepare, arguments, message",
  [
    (lambda p: None, ["gone"], "error: gone is no run: it has no metrics.jsonl"),
    (lambda p: (p / "r").mkdir(), ["r"], "error: r is no run: it has no metrics.jsonl"),
    (
      lambda p: ((p / "r").mkdir(), (p / "r" / "metrics.jsonl").touch()),
      ["r"],
      "error: r/metrics.jsonl is empty: the run has logged nothing yet",
    ),
    (
      lambda p: write_run(p / "r"),
      ["r", "--metrics", "loss,reward"],
      "error: no run has reward over step; they have eval/loss, loss, step_time_s, tokens",
    ),
  ],
)
def test_what_is_missing_is_named(tmp_path, prepare, arguments, message):
  prepare(tmp_path)
  result = run_tool(*arguments, cwd=tmp_path)
  assert (result.returncode, result.stderr, result.stdout) == (2, message + "\n", "")
  assert not (tmp_path / "curves.png").exists()


def test_axes():
  lines = [
    {"step": 10, "loss": 1.0, "tokens": 100, "step_time_s": 6.0},
    {"step": 10, "eval/loss": 3.0},
    {"step": 20, "loss": None, "tokens": 200, "step_time_s": 12.0},
  ]
  np.testing.assert_array_equal(plot_runs.positions(lines, "step"), [10, 10, 20])
  np.testing.assert_array_equal(plot_runs.positions(lines, "tokens"), [100, 100, 200])
  np.testing.assert_array_equal(plot_runs.positions(lines, "time"), [1, 1, 3])
  x, y = plot_runs.curve(lines, "loss", "tokens")
  np.testing.assert_array_equal(x, [100, 200])
  np.testing.assert_array_equal(y, [1, np.nan])
  x, _ = plot_runs.curve([{"step": 0, "eval/loss": 5.0}, *lines], "eval/loss", "tokens")
  np.testing.assert_array_equal(x, [100])  # tokens before the first line are not known


def test_smoothing():
  np.testing.assert_allclose(plot_runs.smooth(np.full(9, 3.0), 5), 3.0)
  values = np.array([1.0, np.nan, 2.0])
  np.testing.assert_allclose(plot_runs.smooth(values, 2), [(1 + 4 / 3) / 2, np.nan, (5 / 3 + 2) / 2])
  np.testing.assert_allclose(plot_runs.smooth(values, 1), values)
  line = np.arange(100.0)
  np.testing.assert_allclose(plot_runs.smooth(line, 5)[40:60], line[40:60], rtol=1e-3)  # no lag


def test_names_tell_runs_apart():
  assert plot_runs.run_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
  assert plot_runs.run_names([Path("/x/1/seed"), Path("/x/2/seed")]) == ["1/seed", "2/seed"]
  assert plot_runs.run_names([Path("/x/a"), Path("/x/a")]) == ["a", "a"]

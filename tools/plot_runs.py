"""Compares the curves of several runs in one picture.

    python tools/plot_runs.py runs/a runs/b --metrics loss,eval/loss --x tokens --out curves.png

Faint lines are what was logged, strong lines their moving average (exponential, to both sides, so that
it does not lag); metrics logged rarely, such as eval/loss, get markers and no smoothing.
"""

import argparse
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np

from jaxllm.base.errors import DataError, UserError
from jaxllm.training.files import read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import EngFormatter

AXES = {"step": "step", "tokens": "tokens", "time": "training time (minutes)"}
FEW = 30  # points; fewer are drawn as they are, with markers


def load_run(path: Path) -> list[dict]:
  """The lines of a run's metrics.jsonl. Raises DataError if there are none."""
  file = path / "metrics.jsonl" if path.is_dir() else path
  if not file.is_file():
    raise DataError(f"{path} is no run: it has no metrics.jsonl")
  lines = read_metrics(file)
  if not lines:
    raise DataError(f"{file} is empty: the run has logged nothing yet")
  return lines


def positions(lines: list[dict], axis: str) -> np.ndarray:
  """Where each line lies on the x axis; NaN before the first line that says.

  Time is the sum of the steps' durations, so that pauses between restarts do not count. Lines without
  the figure (evaluations) lie at the latest that is known.
  """
  result, last_step, now = [], 0, np.nan
  for line in lines:
    if axis == "step":
      now = line["step"]
    elif axis == "tokens" and line.get("tokens") is not None:
      now = line["tokens"]
    elif axis == "time" and line.get("step_time_s") is not None:
      now = np.nan_to_num(now) + (line["step"] - last_step) * line["step_time_s"] / 60
      last_step = line["step"]
    result.append(now)
  return np.array(result, float)


def curve(lines: list[dict], metric: str, axis: str) -> tuple[np.ndarray, np.ndarray]:
  """x and y of the lines that have `metric`; a null (NaN or infinity when it was logged) is a gap."""
  x = positions(lines, axis)
  chosen = [i for i, line in enumerate(lines) if metric in line and not np.isnan(x[i])]
  y = [np.nan if lines[i][metric] is None else lines[i][metric] for i in chosen]
  return x[chosen], np.array(y, float)


def smooth(values: np.ndarray, span: float) -> np.ndarray:
  """The mean of the exponential moving averages from the left and from the right; gaps stay gaps."""
  return (_average(values, span) + _average(values[::-1], span)[::-1]) / 2


def _average(values: np.ndarray, span: float) -> np.ndarray:
  """Each point's weights sum to 1, from the first point on."""
  decay = 1 - 1 / max(span, 1)
  result, total, weight = np.full_like(values, np.nan), 0.0, 0.0
  for i, value in enumerate(values):
    if not np.isnan(value):
      total, weight = decay * total + value, decay * weight + 1
      result[i] = total / weight
  return result


def run_names(paths: list[Path]) -> list[str]:
  """The shortest tails of the paths that tell them apart."""
  parts = [path.resolve().parts for path in paths]
  depth = 1
  while depth < max(map(len, parts)) and len({p[-depth:] for p in parts}) < len(set(parts)):
    depth += 1
  return ["/".join(p[-depth:]) for p in parts]


def plot(paths: list[Path], metrics: list[str], axis: str, out: Path, span: float | None, log: bool) -> None:
  """Draws one panel for each metric and one colour for each run. Raises DataError for what is missing."""
  runs = dict(zip(run_names(paths), map(load_run, paths)))
  figure, panels = plt.subplots(1, len(metrics), figsize=(6.4 * len(metrics), 4.4), squeeze=False, layout="constrained")
  for metric, panel in zip(metrics, panels[0]):
    drawn = 0
    for number, (name, lines) in enumerate(runs.items()):
      x, y = curve(lines, metric, axis)
      if not np.isfinite(y).any():
        continue
      drawn += 1
      color = f"C{number % 10}"
      if len(y) < FEW:
        panel.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.6, label=name)
        continue
      panel.plot(x, y, color=color, linewidth=0.8, alpha=0.25)
      panel.plot(x, smooth(y, span or len(y) / 50), color=color, linewidth=1.8, label=name)
    if not drawn:
      known = sorted({key for lines in runs.values() for key in names_in(lines)} - {"step"})
      raise DataError(f"no run has {metric} over {axis}; they have {', '.join(known)}")
    panel.set(xlabel=AXES[axis], title=metric)
    if log:
      panel.set_yscale("log")
    if axis != "time":
      panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
  out.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(out, dpi=150)
  plt.close(figure)


def names_in(lines: list[dict]) -> set[str]:
  return {key for line in lines for key in line}


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", nargs="+", type=Path, help="run directories (or metrics.jsonl files)")
  parser.add_argument("--metrics", default="loss", help="comma-separated names, one panel each")
  parser.add_argument("--x", choices=AXES, default="step")
  parser.add_argument("--out", type=Path, default=Path("curves.png"))
  parser.add_argument("--smooth", type=float, help="points that the average spans (default: 1/50 of the curve)")
  parser.add_argument("--log", action="store_true", help="logarithmic y axis")
  options = parser.parse_args(arguments)
  metrics = [name for name in options.metrics.split(",") if name]
  try:
    plot(options.runs, metrics, options.x, options.out, options.smooth, options.log)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(os.path.relpath(options.out))
  return 0


if __name__ == "__main__":
  sys.exit(main())

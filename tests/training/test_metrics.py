"""metrics.jsonl and the trackers beside it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.training.files import read_metrics
from jaxllm.training.metrics import MetricsLogger


class Recorder:
  def __init__(self):
    self.calls = []

  def log(self, step, metrics):
    self.calls.append(("log", step, dict(metrics)))

  def log_text(self, step, name, text):
    self.calls.append(("text", step, name, text))

  def close(self):
    self.calls.append(("close",))


def test_every_line_is_json_and_floats_survive(tmp_path):
  recorder = Recorder()
  with MetricsLogger(tmp_path, trackers=[recorder]) as logger:
    logger.log(1, {"loss": jnp.float32(0.1), "tokens": 2**40, "learning_rate": 3e-4})
    logger.log(2, {"loss": float("nan"), "grad_norm": np.float32("inf"), "eval/loss": -float("inf")})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2, "flushed before close"
    logger.log_text(2, "sample/0", "once upon")

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  text = (tmp_path / "metrics.jsonl").read_text()
  first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
  assert np.float32(first["loss"]) == np.float32(0.1) and first["tokens"] == 2**40
  assert second == {"step": 2, "loss": None, "grad_norm": None, "eval/loss": None}
  assert (tmp_path / "samples" / "00000002-sample-0.txt").read_text() == "once upon"
  kinds = [call[:2] for call in recorder.calls]
  assert kinds == [("log", 1), ("log", 2), ("text", 2), ("close",)]
  assert np.isnan(recorder.calls[1][2]["loss"]), "trackers can show NaN"


@pytest.mark.parametrize("resumed, expected", [(20, [10, 20]), (None, []), (25, [10, 20]), (99, [10, 20, 30])])
def test_resuming_drops_what_comes_after_the_checkpoint(tmp_path, resumed, expected):
  with MetricsLogger(tmp_path) as logger:
    for step in (10, 20, 30):
      logger.log(step, {"loss": 1 / step})
  path = tmp_path / "metrics.jsonl"
  original = path.read_text().splitlines()
  path.write_text(path.read_text() + '{"step": 40, "lo')  # killed in the middle of a line
  with MetricsLogger(tmp_path, resumed_step=resumed) as logger:
    assert [line["step"] for line in read_metrics(path)] == expected
    logger.log(100, {"loss": 0.5})
  assert [line["step"] for line in read_metrics(path)] == [*expected, 100]
  assert path.read_text().splitlines()[: len(expected)] == original[: len(expected)], "the rest is untouched"

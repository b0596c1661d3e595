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


STRANGE = {
  "cut short": b'{"step": 2, "lo',
  "binary": bytes(range(256)).replace(b"\n", b""),
  "a list": b"[1, 2]",
  "a number": b"3",
  "no step": b'{"loss": 1.0}',
  "a step in words": b'{"step": "2", "loss": 1.0}',
  "half a step": b'{"step": 1.5}',
  "text for a number": b'{"step": 1, "loss": "low"}',
  "a group": b'{"step": 1, "loss": {"a": 1}}',
  "too deep": b"[" * 100_000,
  "no text": b'\xff\xfe{"step": 1}',
  "infinity": b'{"step": 1, "loss": Infinity}',
  "NUL": b"\0\0\0\0",
  "an integer that is no float": b'{"step": 1, "eval/loss": 1' + b"0" * 400 + b"}",
}


@pytest.mark.parametrize("line", STRANGE.values(), ids=STRANGE)
def test_strange_lines_are_left_out_and_said(tmp_path, caplog, line):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n\n{"step": 2, "loss": null}\n' + line)
  with caplog.at_level("WARNING", "jaxllm"), MetricsLogger(tmp_path, resumed_step=2) as logger:
    assert list(logger.resumed) == ["loss"] and np.isnan(logger.resumed["loss"])
    logger.log(3, {"loss": 1.0})
  (said,) = [record.getMessage() for record in caplog.records]
  assert said == f"{path}: 2 lines are not of metrics and left out (2, 5)"
  rows = [json.loads(text) for text in path.read_text().splitlines()]
  assert rows == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]


def test_a_full_disk_is_one_line(tmp_path):
  from jaxllm.base.errors import CheckpointError

  (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
  logger = MetricsLogger.__new__(MetricsLogger)
  logger._directory, logger._trackers, logger._file = tmp_path, [], (tmp_path / "metrics.jsonl").open("a")
  with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}/metrics.jsonl: the disk is full; free some"):
    logger.log(1, {"loss": 1.0})
  logger.close()


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, caplog):
  class Tracker:
    def __init__(self, fails):
      self.seen, self.fails = [], fails

    def log(self, step, metrics):
      if self.fails and step == 2:
        raise RuntimeError("503 from\nhttp://tracker")
      self.seen.append(step)

    def close(self):
      self.seen.append("closed")

  bad, good = Tracker(True), Tracker(False)
  with caplog.at_level("WARNING", "jaxllm"), MetricsLogger(tmp_path, trackers=[bad, good]) as logger:
    for step in (1, 2, 3):
      logger.log(step, {"loss": 1.0})
  assert (bad.seen, good.seen) == ([1], [1, 2, 3, "closed"])
  (said,) = [record.getMessage() for record in caplog.records]
  assert said.startswith("Tracker fails (RuntimeError: 503 from http://tracker): the run goes on without it")
  assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3

"""How a run went: metrics.jsonl."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxllm.base.errors import one_line
from jaxllm.base.files import write_atomically
from jaxllm.base.os_errors import explain, file_errors
from jaxllm.parallel import agreement
from jaxllm.training.files import METRICS, read_metrics
from jaxllm.training.trackers import Tracker

logger = logging.getLogger("jaxllm")


class MetricsLogger:
  """Appends lines to metrics.jsonl and passes them to the trackers; only the first process writes.

  `resumed_step` is the checkpoint that the run goes on from (None: from the start). Lines beyond it,
  left by a run that was killed, are dropped, so that no step is there twice. `resumed` is what the lines
  of that step say, on every process.
  """

  def __init__(
    self, run_directory: str | os.PathLike, resumed_step: int | None = None, trackers: Sequence[Tracker] = ()
  ):
    self._directory = Path(run_directory)
    self._trackers = list(trackers)
    self._file = None
    resumed: dict[str, float] = {}
    if jax.process_index() == 0:
      path = self._directory / METRICS
      with file_errors(path, "cannot read or write"):
        if path.exists():
          for line in drop_lines_after(path, -1 if resumed_step is None else resumed_step):
            if line["step"] == resumed_step:
              resumed |= {k: math.nan if v is None else v for k, v in line.items() if k != "step"}
        self._file = path.open("a")
    self.resumed: dict[str, float] = agreement.from_first(resumed)

  def __enter__(self) -> "MetricsLogger":
    return self

  def __exit__(self, *error) -> None:
    self.close()

  def log(self, step: int, metrics: Mapping[str, Any]) -> None:
    """One line; values are numbers or scalar arrays. NaN and infinity become null: JSON has neither."""
    if self._file is None:
      return
    values = {name: v if isinstance(v, int) else float(v) for name, v in metrics.items()}
    line = {name: v if math.isfinite(v) else None for name, v in values.items()}
    with file_errors(self._file.name, "cannot write"):
      self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
      self._file.flush()
    self._tell(lambda tracker: tracker.log(step, values))

  def has_text(self, step: int, name: str) -> bool:
    """Whether `log_text` has written this, now or before the run was resumed; on the first process only."""
    return self._file is not None and self._text_file(step, name).exists()

  def _text_file(self, step: int, name: str) -> Path:
    return self._directory / "samples" / f"{step:08}-{name.replace('/', '-')}.txt"

  def log_text(self, step: int, name: str, text: str) -> None:
    """A sample: a file <run>/samples/<step>-<name>.txt, and the trackers."""
    if self._file is None:
      return
    file = self._text_file(step, name)
    with file_errors(file, "cannot write"):
      file.parent.mkdir(exist_ok=True)
      write_atomically(file, text.encode(errors="replace"))
    self._tell(lambda tracker: tracker.log_text(step, name, text))

  def close(self) -> None:
    if self._file is not None:
      with contextlib.suppress(OSError):  # a full disk, where `log` has failed
        self._file.close()
      self._file = None
      self._tell(lambda tracker: tracker.close())

  def _tell(self, say: Callable[[Tracker], None]) -> None:
    """Passes something on. A tracker that fails (its service is gone, its disk full) is left out from there on: a run
    of weeks must not end of it."""
    for tracker in list(self._trackers):
      try:
        say(tracker)
      except Exception as error:  # its library's own
        reason = explain(error) or f"{type(error).__name__}: {one_line(error, 200)}"
        self._trackers.remove(tracker)
        name = type(tracker).__name__
        logger.warning("%s fails (%s): the run goes on without it, and metrics.jsonl has the figures", name, reason)


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
  """Leaves the lines up to a step, and returns them."""
  kept = [line for line in read_metrics(path) if line["step"] <= step]
  write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
  return kept

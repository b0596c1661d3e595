"""metrics.jsonl, read without jax."""

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from jaxllm.base.files import regular

METRICS = "metrics.jsonl"
log = logging.getLogger("jaxllm")


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl: objects with a whole number "step" and numbers, or null where there was none.

  A line that is something else (cut short by a kill, another program's, binary) is left out, which a warning says.

  Raises:
    OSError: the file cannot be read.
  """
  lines, strange = [], []
  for number, text in enumerate(regular(Path(path)).read_bytes().split(b"\n"), 1):
    if not text.strip():
      continue
    try:
      line = json.loads(text.decode())
    except (ValueError, RecursionError):
      line = None
    if _is_one(line):
      lines.append(line)
    else:
      strange.append(number)
  if strange:
    some = ", ".join(map(str, strange[:5])) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
    what = "line is not" if len(strange) == 1 else "lines are not"
    log.warning("%s: %d %s of metrics and left out (%s)", path, len(strange), what, some)
  return lines


def _is_one(line: Any) -> bool:
  if not isinstance(line, dict) or type(line.get("step")) is not int:
    return False
  return all(value is None or _is_finite(value) for value in line.values())


def _is_finite(value: Any) -> bool:
  try:
    return type(value) in (int, float) and math.isfinite(value)
  except OverflowError:  # an integer that is no floating-point number
    return False

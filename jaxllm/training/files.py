"""metrics.jsonl, read without jax."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; one that a kill cut short is left out."""
  lines = []
  for line in Path(path).read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      lines.append(json.loads(line))
  return lines

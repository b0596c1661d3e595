"""Small files that a crash may not spoil."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
  """Replaces the file or leaves the old one: writes beside it, flushes to the disk, then renames."""
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("wb") as file:
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
  directory = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(directory)  # the rename itself
  finally:
    os.close(directory)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; one that a kill cut short is left out."""
  lines = []
  for line in Path(path).read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      lines.append(json.loads(line))
  return lines

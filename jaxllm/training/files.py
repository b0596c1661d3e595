"""Writing small files so that a crash leaves either the old one or the new one."""

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
  """Writes beside `path`, flushes to the disk, then renames over it."""
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

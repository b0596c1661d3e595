"""Which files a source's path means (globs, exclusions, names that look like globs and are none), and whether they are
still what they were when they were listed."""

import glob
import itertools
import os
import re
from typing import NamedTuple

from jaxllm.base.errors import DataError
from jaxllm.base.os_errors import file_errors
from jaxllm.data.config import SourceConfig

_LONGEST = 4096  # bytes of a path, PATH_MAX of Linux


class File(NamedTuple):
  relative: str  # to the source's root; part of the documents' ids
  path: str
  size: int  # bytes, when it was listed
  time: int  # of its last change then, in nanoseconds

  def check(self) -> None:
    """Every pass over a corpus must read the same, or what is written is of no corpus at all.

    Raises:
      DataError: the file is another one since it was listed. OSError: it is gone.
    """
    if file_facts(self.path) != (self.size, self.time):
      raise DataError(f"{self.path} changed while it was being prepared: run python -m jaxllm.prepare again")


def file_facts(path: str) -> tuple[int, int]:
  """Size and time: what tells that a file is (probably) another."""
  status = os.stat(path)
  return status.st_size, status.st_mtime_ns


def patterns_of(path: str) -> tuple[list[str], list[str]]:
  """Globs to include and, those written with a leading "!", to exclude: the parts between commas.

  A file whose name has a comma is one part.
  """
  pieces = path.split(",")
  parts: list[str] = []
  while pieces:
    real, name = 1, pieces[0]
    for end, piece in enumerate(pieces[1:], 2):
      name = f"{name},{piece}"
      if len(name) > _LONGEST:
        break
      real = end if os.path.isfile(os.path.expanduser(name.strip())) else real
    parts.append(",".join(pieces[:real]).strip())
    pieces = pieces[real:]
  parts = [part for part in parts if part]
  include = [os.path.expanduser(part) for part in parts if not part.startswith("!")]
  if not include:
    raise DataError(f"data source path {path!r} names no file: add a glob without a leading '!'")
  return include, [os.path.expanduser(part[1:]) for part in parts if part.startswith("!")]


def match_files(config: SourceConfig) -> list[File]:
  """The files of a source, sorted, each once.

  Raises:
    DataError: a glob matches nothing, or all that it matches is excluded.
  """
  include, exclude = patterns_of(config.path)
  excluded = [re.compile(_glob_regex(pattern), re.DOTALL) for pattern in exclude]
  root = root_of(include)
  found = {}
  for pattern in include:
    if os.path.isdir(pattern):
      raise DataError(f"data source path {pattern} is a directory: write a glob such as {pattern}/**/*.txt")
    matches = [os.path.abspath(m) for m in glob.glob(_escaped(pattern), recursive=True) if os.path.isfile(m)]
    if not matches:
      if os.path.exists(pattern):
        raise DataError(f"data source {pattern} is a pipe, socket or device; it is read twice, so it must be a file")
      what = "glob matches no file" if glob.has_magic(pattern) else "file does not exist"
      raise DataError(f"data source {what}: {pattern} (in {os.getcwd()}); mend the source's `path`")
    for path in matches:
      if not any(regex.fullmatch(path) for regex in excluded):
        found[os.path.relpath(path, root)] = path
  if not found:
    raise DataError(f"data source path {config.path!r} excludes every file that it includes")
  with file_errors("the corpus", kind=DataError):
    return [File(relative, path, *file_facts(path)) for relative, path in sorted(found.items())]


def root_of(patterns: list[str]) -> str:
  """The deepest directory above everything that the globs can match."""
  fixed = [itertools.takewhile(lambda folder: not folder[1], _parts(pattern)[:-1]) for pattern in patterns]
  return os.path.commonpath([os.sep.join(part for part, _ in folders) or os.sep for folders in fixed])


def _parts(pattern: str) -> list[tuple[str, bool]]:
  """The folders of an absolute path, and whether each is a glob; what there is by that very name is none."""
  parts: list[tuple[str, bool]] = []
  so_far = ""
  for number, part in enumerate(os.path.abspath(pattern).split(os.sep)):
    so_far = so_far + os.sep + part if number else part
    real = not any(wild for _, wild in parts) and os.path.lexists(so_far)
    parts.append((part, glob.has_magic(part) and not real))
  return parts


def _escaped(pattern: str) -> str:
  """An absolute glob that takes names with brackets for what they are."""
  return os.sep.join(part if wild else glob.escape(part) for part, wild in _parts(pattern))


def _glob_regex(pattern: str) -> str:
  """A regex of absolute paths for the exclusions; glob.translate needs Python 3.13."""
  pattern = pattern if pattern.startswith("**") else _escaped(pattern)
  pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
  wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
  return "".join(wild.get(piece) or (_class(piece) if piece.startswith("[") else re.escape(piece)) for piece in pieces)


def _class(piece: str) -> str:
  """A glob's "[...]" as a regex."""
  inside = piece[1:-1]
  negated, inside = inside.startswith("!"), inside.removeprefix("!")
  if not inside or (inside.startswith("[") and len(inside) > 1):
    return re.escape(piece)
  return f"[{'^' if negated else ''}{re.escape(inside).replace(re.escape('-'), '-')}]"

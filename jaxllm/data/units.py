"""A source cut into units that can be read independently, by any process and in any order.

What the units are and how they follow each other is decided by the source alone: never by who reads them. Documents
have the ids that they would have without units.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from jaxllm.data.paths import File

_SMALLEST, _LARGEST = 16 << 20, 256 << 20  # bytes of a unit, where the source can be cut
_MOST_UNITS = 1024  # of a source whose units are not of the largest size yet


class Unit(NamedTuple):
  """Some whole files; or of one file the lines that begin in bytes [start, stop), or these row groups; or these rows
  of a data set, which has no files; or this one of the parts of a stream (start of stop)."""

  files: tuple[File, ...] = ()
  start: int = 0
  stop: int | None = None  # None: to the end
  first: int | None = 0  # the number of the first line or row; None: nobody has counted yet
  size: int = 0  # bytes of text, for progress

  @property
  def where(self) -> str:
    """What errors call it."""
    names = [file.path for file in self.files]
    return (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}") if names else f"rows from {self.start}"


def unit_bytes(total: int) -> int:
  """How large the units of a source of `total` bytes are."""
  return min(max(total // _MOST_UNITS, _SMALLEST), _LARGEST)


def files_in_groups(
  files: Sequence[File], sizes: Sequence[int], split: Callable[[File, int], list[Unit]]
) -> list[Unit]:
  """Neighbouring files together up to the size of a unit; larger ones as `split` cuts them.

  Args:
    sizes: bytes of each.
    split: the units of a file, of that many bytes, that is larger than a unit.
  """
  most = unit_bytes(sum(sizes))
  units: list[Unit] = []
  group: list[File] = []
  held = 0
  for file, size in zip(files, sizes):
    if group and held + size > most:
      units.append(Unit(tuple(group), size=held))
      group, held = [], 0
    if size > most:
      units += split(file, size)
    else:
      group.append(file)
      held += size
  return [*units, Unit(tuple(group), size=held)] if group else units


def byte_ranges(file: File, size: int, most: int) -> list[Unit]:
  """A file of lines in equal parts, at most `most` bytes each, whose lines are not counted."""
  step = math.ceil(size / math.ceil(size / most))
  starts = range(0, size, step)
  return [Unit((file,), at, min(at + step, size), None, min(step, size - at)) for at in starts]


def row_ranges(rows: int, size: int) -> list[Unit]:
  """The rows of a data set of `size` bytes in equal parts."""
  step = max(1, math.ceil(rows / max(1, math.ceil(size / unit_bytes(size)))))
  each = size / max(rows, 1)
  edges = itertools.pairwise([*range(0, rows, step), rows])
  return [Unit((), start, stop, start, round(each * (stop - start))) for start, stop in edges]


def count_lines(unit: Unit) -> int:
  """How many lines begin in a byte range."""
  assert unit.stop is not None
  lines, left = int(unit.start == 0), unit.stop - unit.start - (unit.start == 0)
  with open(unit.files[0].path, "rb") as file:
    file.seek(max(unit.start - 1, 0))
    while left > 0 and (data := file.read(min(left, 1 << 22))):
      lines += data.count(b"\n")
      left -= len(data)
  return lines


def numbered(units: Sequence[Unit], lines: Iterator[int]) -> list[Unit]:
  """The units with the number of their first line.

  Args:
    lines: of each whose `first` is None, in order; of no other is one taken.
  """
  known, number = [], 0
  for unit in units:
    if unit.first is None:
      number = 1 if unit.start == 0 else number
      unit = unit._replace(first=number)
      here = next(lines)
      number += here
      if not here:  # a line from before goes through it
        unit = unit._replace(stop=unit.start)
    known.append(unit)
  return known

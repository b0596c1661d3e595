"""What strangers, disks and networks make of files: `tools/fuzzing.py`'s inputs, as rows of the table."""

from collections.abc import Iterator

from torments.corruptions import Row


def fuzzed(reader: str, inputs: int, seed: int) -> Iterator[Row]:
  """So many inputs for a reader."""
  from fuzzing import fuzz

  counts = fuzz(reader, inputs, seed)
  for result in ("loaded", "refused"):
    for _ in range(getattr(counts, result)):
      yield Row("strange input", reader, result)
  for fault in counts.faults:
    yield Row("strange input", reader, "fault", fault)

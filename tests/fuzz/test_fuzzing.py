"""Every reader of files against mutated inputs (tools/fuzzing.py): loaded, or refused in a line."""

import random
import sys
from pathlib import Path

import pytest

from jaxllm.base.errors import DataError

sys.path.append(str(Path(__file__).parents[2] / "tools"))

import fuzzing
from fuzz_configs import CONFIGS
from fuzz_readers import READERS

from jaxllm.interop.families import FAMILIES

INPUTS = 30


@pytest.mark.parametrize("name", READERS)
def test_no_input_is_a_fault(name):
  kinds, faults = [], []

  def tell(number, kind, text):
    kinds.append(kind)
    if kind == "fault":
      faults.append(f"python tools/fuzzing.py --only={number} {name}: {text}")

  fuzzing.work(READERS[name], name, 0, 0, INPUTS, tell)
  assert not faults
  assert len(kinds) == INPUTS and "refused" in kinds


def test_every_family_is_among_the_inputs():
  assert CONFIGS.keys() == FAMILIES.keys()


def test_inputs_are_counted_and_are_the_same_again():
  first, second = (fuzzing.fuzz("safetensors", 25, seed=3) for _ in range(2))
  assert first == second and first.loaded + first.refused == 25 and not first.faults


def raises(error):
  def read(path):
    raise error

  return fuzzing.Reader(lambda path: None, read)


class Panic(BaseException):
  pass


@pytest.mark.parametrize(
  "reader, kind",
  [
    (fuzzing.Reader(lambda path: None, lambda path: None), "loaded"),
    (raises(DataError("damaged\n\x1b")), "refused"),
    (raises(KeyError("a")), "fault"),
    (raises(Panic()), "fault"),
    (fuzzing.Reader(lambda path: None, lambda path: bytearray(3 << 29)), "fault"),
  ],
  ids=["loaded", "refused", "KeyError", "panic", "memory"],
)
def test_what_counts_as_a_fault(reader, kind, tmp_path):
  assert fuzzing.classify(reader, tmp_path)[0] == kind


def test_a_long_message_is_a_fault(tmp_path, monkeypatch):
  monkeypatch.setattr(DataError, "__str__", lambda self: "x" * 501)
  assert fuzzing.classify(raises(DataError()), tmp_path)[0] == "fault"


def test_a_computation_that_does_not_end_soon_is_a_fault(tmp_path, monkeypatch):
  monkeypatch.setattr(fuzzing, "HANG_SECONDS", 0.01)
  reader = fuzzing.Reader(lambda path: None, lambda path: sum(range(10**7)))
  assert fuzzing.classify(reader, tmp_path)[0] == "fault"


def test_a_process_that_ends_is_a_fault_and_the_next_input_is_read(monkeypatch):
  runs = [[(0, "loaded", ""), (1, "fault", "the process ends with -11")], [(2, "refused", "x"), (3, "loaded", "")]]
  asked = []

  def run(reader, seed, first, last):
    asked.append(first)
    return iter(runs[len(asked) - 1])

  monkeypatch.setattr(fuzzing, "_run", run)
  counts = fuzzing.fuzz("any", 4)
  assert asked == [0, 2]
  assert counts == fuzzing.Counts(2, 1, ["any 0 1: the process ends with -11"])


def test_mutations_change_files_and_only_by_their_seed(tmp_path):
  data = {tmp_path / "a.json": b'{"a": [1, 2, {"b": "c"}], "d": null}', tmp_path / "b.bin": bytes(range(200))}

  def changed(seed):
    for path, content in data.items():
      path.write_bytes(content)
    fuzzing.mutate(list(data), data, random.Random(seed))
    return tuple(path.read_bytes() for path in data)

  results = [changed(seed) for seed in range(60)]
  assert results == [changed(seed) for seed in range(60)]
  assert len(set(results)) > 50 and sum(result != tuple(data.values()) for result in results) > 55

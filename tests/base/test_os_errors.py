"""What the operating system refuses becomes one line, in whatever form it comes."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from jaxllm.base.errors import CheckpointError, DataError
from jaxllm.base.os_errors import KNOWN, explain, file_errors, number_of, one_line


@pytest.mark.parametrize("number", [*KNOWN, errno.EPROTO])
def test_every_error_has_its_path_what_happened_and_what_to_do(number):
  line = explain(OSError(number, os.strerror(number), "/a/b"), "cannot read", "/another")
  what, advice = KNOWN.get(number, (os.strerror(number).lower(), "check it, then start again"))
  assert line == f"cannot read /a/b: {what}; {advice}" and "\n" not in line
  assert explain(OSError(number, "x"), "cannot read", "/another").startswith("cannot read /another: ")


@pytest.mark.parametrize(
  "error, number",
  [
    (ValueError("Error writing: os_error_code='28' source"), errno.ENOSPC),  # TensorStore
    (RuntimeError('Not found: "x.model": No such file or directory Error #2'), errno.ENOENT),  # SentencePiece
    (RuntimeError("open() failed: Too many open files; opening /x"), errno.EMFILE),  # ArrayRecord
    (Exception("No space left on device (os error 28)"), errno.ENOSPC),  # Rust
    (MemoryError(), errno.ENOMEM),
    (ValueError("no file is meant"), None),
    (CheckpointError("a step was Permission denied"), None),
  ],
)
def test_libraries_say_it_in_their_own_ways(error, number):
  assert number_of(error) == number
  assert (explain(error) is None) == (number is None)


def test_the_cause_of_an_error_counts_and_a_circle_ends():
  try:
    try:
      raise OSError(errno.EDQUOT, "x")
    except OSError as inner:
      raise KeyError("a") from inner
  except KeyError as error:
    assert number_of(error) == errno.EDQUOT
    error.__cause__.__cause__ = error
  one, other = ValueError("a"), ValueError("b")
  one.__cause__, other.__cause__ = other, one
  assert number_of(one) is None


def test_real_errors(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "dangling").symlink_to(tmp_path / "gone")
  (tmp_path / "round").symlink_to("round")
  cases = {
    tmp_path / "none": "there is no such file or folder",
    tmp_path / "file" / "x": "a part of the path is a file and no folder",
    tmp_path: "it is a folder",
    tmp_path / "dangling": f"dangling is a link to {tmp_path}/gone, which is not there; mend or remove the link",
    tmp_path / "dangling" / "x": "is a link to",
    tmp_path / "round": "its links go round in a circle",
    tmp_path / ("n" * 300): "the name is too long",
  }
  for path, message in cases.items():
    with pytest.raises(DataError) as error, file_errors(path, kind=DataError):
      path.read_bytes()
    said = str(error.value)
    assert said.startswith(f"cannot read {one_line(path, 300)}: ") and message in said and len(said) < 800


def test_a_name_with_line_breaks_stays_one_line(tmp_path):
  line = explain(FileNotFoundError(2, "x", str(tmp_path / "a\nb\x1b[31m\ud800")))
  assert line.isprintable() and "a b\\x1b[31m" in line


def test_too_many_open_files_in_a_checkpoint_is_no_damage(tmp_path):
  """With a limit of the kernel's, and not a stand-in."""
  code = """
    import resource, sys
    from pathlib import Path
    from jaxllm.base import digests
    place = Path(sys.argv[1])
    for i in range(4):
      (place / f"{i}.json").write_text("{}")
    digests.seal(place)
    assert digests.check(place)
    held = [open("/dev/null") for _ in range(10)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1].fileno() + 1,) * 2)
    try:
      digests.check(place)
    except Exception as error:
      print(type(error).__name__, error)
  """
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
  assert done.stdout.startswith(f"CheckpointError cannot read {tmp_path}"), done.stderr
  assert "this program has too many open files; raise the limit (ulimit -n)" in done.stdout

"""Programs of strangers in another process: limits hold, and what comes after them is as before."""

import os
import signal
import threading

import pytest

from jaxllm.base import bounded

PROGRAM = """
import os, signal, time
def run(what, text):
  if what == "loop":
    while True: pass
  if what == "memory": return str(len(b"x" * (1 << 33)))
  if what == "write": return "x" * ((1 << 25) + 1)
  if what == "end": os._exit(3)
  if what == "raise": raise KeyError(text)
  if what == "deep": return run("deep", text)
  if what == "file":
    with open(text, "w") as file: file.write("x" * 100)
  if what == "pid": return str(os.getpid())
  return text[::-1]
"""


@pytest.fixture
def program(tmp_path):
  (tmp_path / "program.py").write_text(PROGRAM)
  return tmp_path / "program.py"


def test_what_a_program_makes_of_texts(program):
  for text in ("", "abc", "\ud800 \U0001f600\n\0", "x" * 1_000_000):
    assert bounded.run(program, "", text) == text[::-1]
  assert bounded.run(program, "pid", "") == bounded.run(program, "pid", "")  # the process is kept


@pytest.mark.parametrize(
  "what, message",
  [
    ("loop", "more than 1 s"),
    ("memory", "more than 512 MiB of memory"),
    ("write", "writes more than 32 MiB"),
    ("end", "ends the process"),
    ("deep", "nested too deeply"),
  ],
)
def test_a_program_that_exceeds_a_limit_is_ended(program, what, message):
  with pytest.raises(bounded.Exceeded, match=message):
    bounded.run(program, what, "")
  assert bounded.run(program, "", "ab") == "ba"


def test_its_errors_come_back_and_it_writes_no_file(program, tmp_path):
  with pytest.raises(bounded.Failed, match="^KeyError: 'x'"):
    bounded.run(program, "raise", "x")
  with pytest.raises(bounded.Failed, match="OSError"):
    bounded.run(program, "file", str(tmp_path / "made"))


def test_a_process_that_ended_meanwhile_is_replaced(program):
  os.kill(int(bounded.run(program, "pid", "")), signal.SIGKILL)
  for _ in range(3):
    assert bounded.run(program, "", "ab") == "ba"


def test_threads_at_once(program):
  texts, found = [f"text {i}" for i in range(40)], {}

  def ask(text):
    found[text] = bounded.run(program, "", text)

  threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found == {text: text[::-1] for text in texts}


def test_a_forked_process_has_its_own(program):
  ours = bounded.run(program, "pid", "")
  read, write = os.pipe()
  if (child := os.fork()) == 0:
    try:
      os.write(write, bounded.run(program, "pid", "").encode())
    finally:
      os._exit(0)
  os.close(write)
  theirs = os.read(read, 100).decode()
  os.close(read)
  os.waitpid(child, 0)
  assert theirs.isdigit() and theirs != ours == bounded.run(program, "pid", "")


@pytest.mark.parametrize("part", [b'["do', b'["done", 10]\nabc'])
def test_an_answer_that_is_cut_short_is_none(program, monkeypatch, part):
  """Of a process that is killed while it writes: what there is of its answer does not count."""
  bounded.run(program, "", "")
  child = bounded._idle[-1]
  reader, writer = os.pipe()
  os.write(writer, part)
  os.close(writer)
  child._answers.unregister(child._process.stdout)
  child._process.stdout.close()
  child._process.stdout = os.fdopen(reader, "rb")
  child._answers.register(child._process.stdout)
  assert bounded.run(program, "", "ab") == "ba"

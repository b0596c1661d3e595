"""The lock on a directory: who has it, and that death by any means gives it up."""

import contextlib
import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from jaxllm.base.errors import UserError
from jaxllm.base.locks import hold

HOLDER = """
  import os, subprocess, sys
  from pathlib import Path
  from jaxllm.base.locks import hold
  with hold(Path(sys.argv[1])):
    orphan = 0
    if sys.argv[2] == "fork":
      orphan = os.fork()
      if orphan == 0:
        import time
        time.sleep(60)
        os._exit(0)
    if sys.argv[2] == "exec":
      orphan = subprocess.Popen(["sleep", "60"], close_fds=False, stdin=subprocess.DEVNULL).pid
    print(orphan, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def holder(directory, children="none"):
  """Another program that holds the directory until it reads a line, and the process id of its child."""
  env = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
  command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(directory), children]
  process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  orphan = int(process.stdout.readline())
  try:
    yield process, orphan
  finally:
    process.kill()
    process.wait()
    if orphan:
      os.kill(orphan, signal.SIGKILL)


def test_the_second_is_told_who_is_first_until_it_is_dead(tmp_path):
  with holder(tmp_path) as (other, _):
    with pytest.raises(UserError) as refusal, hold(tmp_path, patience_s=0):
      pass
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"
    host = re.escape(socket.gethostname())
    said = re.fullmatch(
      rf"{tmp_path} is in use by pid {other.pid} on host {host} since {since}: (.*)", str(refusal.value)
    )
    assert said and said[1].startswith(sys.executable)
    other.kill()
    other.wait()
    assert f"pid {other.pid} " in (tmp_path / "lock").read_text(), "what a killed program wrote is still there"
    with hold(tmp_path):
      assert f"pid {os.getpid()} " in subprocess.check_output(["cat", tmp_path / "lock"], text=True)
  assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("children", ["fork", "exec"])
def test_orphans_of_a_killed_program_keep_nobody_out(tmp_path, children):
  with holder(tmp_path, children) as (other, orphan):
    other.kill()
    other.wait()
    os.kill(orphan, 0)  # alive
    with hold(tmp_path, patience_s=0):
      pass


def test_who_waits_comes_next(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(logging.getLogger("jaxllm"), "info", lambda text, *args: lines.append(text % args))
  with holder(tmp_path) as (other, _):
    wakes = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    began = time.monotonic()
    with hold(tmp_path, patience_s=60):
      assert time.monotonic() - began > 0.3
    wakes.wait()
  assert len(lines) == 1 and lines[0].startswith(f"waiting for {tmp_path}, which is in use by pid {other.pid} on")


def test_one_program_does_not_get_it_twice_and_keeps_it_when_it_tries(tmp_path):
  with hold(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is in use by this process already"), hold(tmp_path):
      pass
    link = tmp_path.parent / "another name"
    link.symlink_to(tmp_path)
    with pytest.raises(UserError, match="by this process already"), hold(link):
      pass
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    tried = subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], capture_output=True, text=True)
    assert "BlockingIOError" in tried.stderr
  with hold(tmp_path):
    pass


def test_a_file_system_without_locks_is_named_with_who_was_there_last(tmp_path, monkeypatch):
  lines = []
  monkeypatch.setattr(logging.getLogger("jaxllm"), "warning", lambda text, *args: lines.append(text % args))

  def lockf(*args):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "lockf", lockf)
  with hold(tmp_path):
    pass
  with hold(tmp_path):
    pass
  start = (
    f"the file system of {tmp_path} has no locks (No locks available), so nothing keeps a second program out of it"
  )
  assert lines[0] == start
  assert lines[1].startswith(f"{start}; the last to use it was pid {os.getpid()} on host {socket.gethostname()} since ")


def test_what_cannot_be_written_is_said(tmp_path):
  (tmp_path / "lock").mkdir()
  with pytest.raises(UserError, match=f"cannot write {tmp_path}/lock: it is a folder; "), hold(tmp_path):
    pass

"""Every test sees 8 CPU devices; set before jax is imported."""

import atexit
import ctypes
import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    # A busy machine may take minutes to bring eight devices to one collective.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
  ]
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # Shared by the processes of one run (pytest-xdist, tests that start the command line).
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxllm-compilations-")
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


# A shell's background jobs ignore Ctrl-C, which some tests send.
if threading.current_thread() is threading.main_thread():
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
  parser.addoption(
    "--error-table",
    metavar="FILE",
    help="write the errors that `agrees` saw as Markdown, as docs/fine_tuning_errors.md",
  )


def pytest_generate_tests(metafunc):
  """Sets are in another order in every process, and processes that share the tests must name the same ones."""
  for mark in metafunc.definition.iter_markers("parametrize"):
    assert not isinstance(mark.args[1], set | frozenset), f"{metafunc.definition.nodeid}: sort the set of its cases"


@pytest.fixture(autouse=True, scope="module")
def _programs_go_with_their_module():
  """Compiled programs stay in memory, some in a dozen maps each, and a process may have 65,530 maps."""
  yield
  maps = Path("/proc/self/maps")
  if "jax" in sys.modules and (not maps.exists() or maps.read_bytes().count(b"\n") > 6000):
    sys.modules["jax"].clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
      libc.malloc_trim(0)  # training keeps freed memory for its next step


ERRORS = pytest.StashKey[dict]()


@pytest.fixture
def agrees(request):
  """Asserts that arrays are those of an outside program, and notes by how much they are not.

  agrees(subject, what, ours, theirs, limit=1e-5): the largest difference, over the largest of theirs where that is
  more than 1. "LoRA, rank 8", "logits after a step".
  """

  def check(subject: str, what: str, ours, theirs, limit: float = 1e-5) -> None:
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    assert ours.shape == theirs.shape
    error = float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))
    assert error <= limit, f"{subject}: {what} differ by {error:.2e}, more than {limit:.0e}"
    rows = request.config.stash.setdefault(ERRORS, {})
    rows[subject, what] = max(error, rows.get((subject, what), (0.0, limit))[0]), limit

  return check


def pytest_sessionfinish(session):
  file, rows = session.config.getoption("--error-table"), session.config.stash.get(ERRORS, {})
  if not file or not rows:
    return
  lines = ["| | what | largest error | allowed |", "|---|---|---|---|"]
  lines += [f"| {subject} | {what} | {error:.1e} | {limit:.0e} |" for (subject, what), (error, limit) in rows.items()]
  text = Path(file).read_text() if Path(file).exists() else ""
  Path(file).write_text(text.partition("| | what |")[0] + "\n".join(lines) + "\n")


@pytest.fixture
def two_processes():
  """Runs code in the two processes of one job, where `index` says which; returns what each has printed.

  two_processes(code, *arguments, devices=1, timeout=120): the code finds its arguments from sys.argv[1] on.
  """
  started = []

  def run(code: str, *arguments, devices: int = 1, timeout: float = 120) -> list[str]:
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      port = free.getsockname()[1]
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": path}
    for index in range(2):
      start = f'import jax; jax.distributed.initialize("127.0.0.1:{port}", 2, {index})\nindex = {index}\n'
      command = [sys.executable, "-c", start + textwrap.dedent(code), *map(str, arguments)]
      pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
      started.append(subprocess.Popen(command, env=os.environ | flags, **pipes))
    deadline = time.monotonic() + timeout
    outputs = [process.communicate(timeout=deadline - time.monotonic())[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return outputs

  yield run
  for process in started:
    process.kill()
    process.communicate()

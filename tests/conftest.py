"""Every test sees 8 CPU devices; set before jax is imported."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time

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

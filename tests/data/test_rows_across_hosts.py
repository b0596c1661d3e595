"""Two processes, whichever mesh axis runs between them, train and evaluate as one process does."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import mesh_losses
import pytest


@pytest.fixture(scope="module")
def alone(mixture):
  return mesh_losses.measure(mixture, dict(data=1), (0,))


@pytest.mark.parametrize("devices", mesh_losses.PAIRS)
def test_every_axis_may_cross_hosts(mixture, alone, devices, tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  (tmp_path / "prepared").write_bytes(pickle.dumps(mixture))
  command = [sys.executable, mesh_losses.__file__, str(tmp_path / "prepared"), str(port)]
  paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
  # Programs that run three times: compiling them fast is worth more than fast programs.
  fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  environment = os.environ | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {fast}",
    "PYTHONPATH": paths,
  }
  pair = [
    subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240) for process in pair]
  finally:
    for process in pair:
      process.kill()
  assert [process.returncode for process in pair] == [0, 0], [error[-2000:] for _, error in outputs]
  losses, heldout, _ = alone
  for index, (out, _) in enumerate(outputs):
    measured = json.loads(out.splitlines()[-1])
    for case, (found, found_heldout, rows) in zip(mesh_losses.PAIRS[devices], measured, strict=True):
      assert found == pytest.approx(losses, rel=1e-4), case
      assert found_heldout == pytest.approx(heldout, rel=1e-4), case
      assert tuple(rows) == case[2][index], case

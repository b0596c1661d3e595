"""Two processes train as one does, and one goes on where two were."""

import json
import os
import socket
import subprocess
import sys

import pytest


def losses(run):
  rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}, rows[-1]["eval/bits_per_byte"]


def start(job, run, data, *flags, **environment):
  flags = [f"--config={job}", f"--workdir={run}", f"--config.mesh.data={data}", *flags]
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | environment
  command = [sys.executable, "-m", "jaxllm.train", *flags]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


@pytest.mark.slow
def test_two_processes_and_then_one_train_as_one_does(job, tmp_path):
  cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
  constant, short = "--config.optimizer.schedule=constant", "--config.training.steps=4"
  pair = [start(job, tmp_path / "two", 2, constant, short, **cluster, JAX_PROCESS_ID=str(i)) for i in range(2)]
  outputs = [process.communicate(timeout=300)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], outputs
  for run in ("two", "one"):
    alone = start(job, tmp_path / run, 1, constant)
    out = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, out
  (two, two_bits), (one, one_bits) = losses(tmp_path / "two"), losses(tmp_path / "one")
  assert two.keys() == one.keys()
  assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
  assert two_bits == pytest.approx(one_bits, rel=1e-4)


@pytest.mark.slow
def test_a_tensor_axis_between_two_processes_trains_as_one_process_does(job, tmp_path):
  """Each of them reads all rows; of a batch, too, that the number of processes does not divide."""
  cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
  flags = "--config.training.steps=3", "--config.training.batch_size=3"
  pair = [
    start(job, tmp_path / "two", 1, "--config.mesh.tensor=2", *flags, **cluster, JAX_PROCESS_ID=str(i))
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=300)[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], outputs
  alone = start(job, tmp_path / "one", 1, *flags)
  out = alone.communicate(timeout=300)[0]
  assert alone.returncode == 0, out
  (two, two_bits), (one, one_bits) = losses(tmp_path / "two"), losses(tmp_path / "one")
  assert two.keys() == one.keys()
  assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
  assert two_bits == pytest.approx(one_bits, rel=1e-4)

"""Jobs of several processes: how they find each other, and how they end together."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.parallel import hosts

JOB = Path(__file__).with_name("job.py")
AGAIN = "started again with the same command, all processes go on from the last checkpoint"
PATIENCE = "4"


def free_port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def start(what, tmp_path, count=2, **variables):
  """Starts the processes of a job; each writes into a file."""
  address = f"127.0.0.1:{free_port()}"
  processes = []
  for index in range(count):
    environment = os.environ | {
      "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(index),
      "JAXLLM_HOST_TIMEOUT_S": PATIENCE,
      "PYTHONPATH": os.pathsep.join([str(JOB.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    with open(tmp_path / f"{index}.txt", "w") as out:
      command = [sys.executable, str(JOB), what]
      processes.append(subprocess.Popen(command, env=environment | variables, stdout=out, stderr=subprocess.STDOUT))
  return processes


def wait_for(text, tmp_path, count=2, seconds=120):
  end = time.monotonic() + seconds
  while any(text not in (tmp_path / f"{index}.txt").read_text() for index in range(count)):
    assert time.monotonic() < end, [(tmp_path / f"{index}.txt").read_text() for index in range(count)]
    time.sleep(0.05)


def end_of(processes, tmp_path, seconds=60):
  """The processes' exit codes and outputs."""
  try:
    codes = [process.wait(timeout=seconds) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return codes, [(tmp_path / f"{index}.txt").read_text() for index in range(len(processes))]


def after_stepping(text):
  """What a process says after its steps, without what is not ours to silence."""
  lines = text.split("stepping\n")[-1].splitlines()
  return [line for line in lines if not line.startswith("[Gloo]")]


@pytest.mark.parametrize("what", ["steps", "idle"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_worker_that_falls_silent(what, number, tmp_path):
  """In a collective and outside; within the patience and a little."""
  processes = start(what, tmp_path, 3)
  wait_for("stepping", tmp_path, 3)
  began = time.monotonic()
  processes[1].send_signal(number)
  try:
    codes = [processes[index].wait(timeout=40) for index in (0, 2)]
  finally:
    for process in processes:
      process.kill()
  assert codes == [2, 2]
  assert time.monotonic() - began < 20
  for index in (0, 2):
    line = f"process {index}: error: process 1 has not been heard of for 4 s; {AGAIN}"
    assert after_stepping((tmp_path / f"{index}.txt").read_text()) == [line]


@pytest.mark.parametrize("what", ["steps", "idle"])
def test_the_first_process_is_killed(what, tmp_path):
  """With it goes the service that all meet at: the others know at once."""
  processes = start(what, tmp_path, 3)
  wait_for("stepping", tmp_path, 3)
  began = time.monotonic()
  processes[0].kill()
  codes, texts = end_of(processes, tmp_path)
  assert codes == [-9, 2, 2], texts
  assert time.monotonic() - began < 20
  for index in (1, 2):
    # jax's own line may come first; it is one, without a stack
    *before, last = after_stepping(texts[index])
    assert last == f"process {index}: error: process 0 is gone; {AGAIN}", texts
    assert len(before) <= 1 and all("Polled an error from coordination service" in line for line in before), texts


def test_the_first_process_is_stopped(tmp_path):
  processes = start("idle", tmp_path)
  wait_for("stepping", tmp_path)
  processes[0].send_signal(signal.SIGSTOP)
  try:
    assert processes[1].wait(timeout=40) == 2
  finally:
    for process in processes:
      process.kill()
  line = f"process 1: error: process 0 has not been heard of for 4 s; {AGAIN}"
  assert after_stepping((tmp_path / "1.txt").read_text()) == [line]


@pytest.mark.parametrize(
  "what, own, code, others",
  [
    ("error", ["error: the disk of process 1 is full and so on"], 2, "failed: the disk of process 1 is full and so on"),
    ("bug", None, 1, "failed: KeyError: 'lost'"),
    ("exit", None, 1, "failed: SystemExit: 3"),
    ("plain", None, 1, "failed: the disk of process 1 is full and so on"),
  ],
)
def test_an_error_of_one_process_ends_the_others(what, own, code, others, tmp_path):
  """At once, though they stand in a collective."""
  processes = start(what, tmp_path, 3)
  wait_for("stepping", tmp_path, 3)
  began = time.monotonic()
  codes, texts = end_of(processes, tmp_path)
  assert codes == [2, code, 2], texts
  assert time.monotonic() - began < 15
  for index in (0, 2):
    said, lines = f"process {index}: error: process 1 {others}; {AGAIN}", after_stepping(texts[index])
    assert said in lines
    assert lines == [said] or what == "plain"  # without run_door Python prints what the collective says, too
  if own:
    assert after_stepping(texts[1]) == [f"process 1: {own[0]}", *own[1:]]
  else:
    assert "Traceback" in texts[1]


def test_an_error_that_all_know_of(tmp_path):
  """Each says it once."""
  codes, texts = end_of(start("together", tmp_path), tmp_path)
  assert codes == [2, 2]
  assert after_stepping(texts[1]) == ["process 1: error: the disk of process 1 is full"]
  (line,) = after_stepping(texts[0])
  assert line.startswith("process 0: error: process 1 failed: the disk of process 1 is full")


@pytest.mark.parametrize("what", ["end", "busy"])
def test_a_normal_end(what, tmp_path):
  """Of all, though one comes long after the others and computes in Python until then."""
  codes, texts = end_of(start(what, tmp_path), tmp_path)
  assert codes == [0, 0], texts
  assert [after_stepping(text) for text in texts] == [[], []]
  assert "a line of information" in texts[0] and "a line of information" not in texts[1]
  assert "process 1: a warning" in texts[1] and "process 0" not in texts[0].replace("process 0 of 2", "")


def test_a_process_that_never_comes(tmp_path):
  processes = start("end", tmp_path, JAX_NUM_PROCESSES="3", JAXLLM_START_TIMEOUT_S="3")
  codes, texts = end_of(processes, tmp_path)
  assert codes == [2, 2], texts
  for index, text in enumerate(texts):
    first, last = text.splitlines()
    assert first.startswith(f"process {index} of 3, which meet at 127.0.0.1:")
    assert last.startswith("error: the 3 processes have not come together at 127.0.0.1:")


# Below, nothing is started: one process, with the variables of a cluster.


@pytest.fixture
def variables(monkeypatch):
  """An environment without any cluster, to which a test adds its own."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB", "TPU_", "MEGASCALE_")) or name in hosts.VARIABLES:
      monkeypatch.delenv(name)
  monkeypatch.setattr(hosts, "_connect", lambda job, *patience: pytest.fail(f"connects to {job}"))
  return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


ADDRESS = "127.0.0.1:1234"
SLURM = dict(
  SLURM_JOB_ID="7",
  SLURM_STEP_NODELIST="node[01-02]",
  SLURM_NTASKS="2",
  SLURM_PROCID="1",
  SLURM_LOCALID="0",
)


@pytest.mark.parametrize(
  "values, message",
  [
    (dict(JAX_NUM_PROCESSES="two"), "JAX_NUM_PROCESSES is 'two'; it must be a whole number"),
    (dict(JAX_NUM_PROCESSES="-2"), "JAX_NUM_PROCESSES is '-2'"),
    (dict(JAX_PROCESS_ID="5"), "JAX_PROCESS_ID is 5; with JAX_NUM_PROCESSES=2 it goes from 0 to 1"),
    (dict(JAX_PROCESS_ID=""), "JAX_PROCESS_ID is not set"),
    (dict(JAX_COORDINATOR_ADDRESS="node1"), "JAX_COORDINATOR_ADDRESS is 'node1'; it must be host:port"),
    (dict(JAX_COORDINATOR_ADDRESS="node1:http"), "it must be host:port"),
    (dict(JAXLLM_HOST_TIMEOUT_S="soon"), "JAXLLM_HOST_TIMEOUT_S is 'soon'"),
    (dict(JAXLLM_START_TIMEOUT_S="0"), "JAXLLM_START_TIMEOUT_S is '0'"),
  ],
)
def test_variables_that_make_no_sense(values, message, variables):
  variables(**{"JAX_COORDINATOR_ADDRESS": ADDRESS, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"} | values)
  with pytest.raises(ConfigError, match=re.escape(message)) as caught:
    hosts.join_hosts()
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "values",
  [
    {},
    dict(JAX_NUM_PROCESSES="1"),
    dict(JAX_NUM_PROCESSES="1") | SLURM,
    SLURM | dict(SLURM_NTASKS="1"),
    SLURM | dict(SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),
    dict(SLURM_NTASKS="x"),
    dict(KUBERNETES_SERVICE_HOST="10.0.0.1"),
    dict(TPU_WORKER_HOSTNAMES="a,b"),  # without a TPU
  ],
  ids=["laptop", "asked for", "asked for in slurm", "slurm task", "slurm shell", "login node", "pod", "no tpu"],
)
def test_alone(values, variables, recwarn, caplog):
  variables(**values)
  hosts.join_hosts()
  assert not caplog.records and not recwarn.list


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"])
def test_a_cluster_whose_variable_is_no_number_is_named(name, variables):
  variables(**SLURM | {name: "x"})
  with pytest.raises(ConfigError, match=rf"{name} is 'x'; it must be a whole number.*JAX_NUM_PROCESSES=1 runs this"):
    hosts.join_hosts()


@pytest.mark.parametrize("value", ["x", "0", "70000", "-1", "1.5"])
def test_a_port_that_is_none(value, variables):
  variables(JAX_COORDINATOR_PORT=value)
  with pytest.raises(
    ConfigError, match=f"JAX_COORDINATOR_PORT is '{value}'; it must be a whole number from 1 to 65535"
  ):
    hosts.join_hosts()


@pytest.mark.parametrize("name, value", [("SLURM_NTASKS", "x"), ("SLURM_PROCID", ""), ("SLURM_JOB_ID", "?")])
def test_a_cluster_whose_variables_make_no_sense(name, value, variables):
  variables(**SLURM | {name: value})
  with pytest.raises(ConfigError, match="other processes cannot be found out .*JAX_NUM_PROCESSES=1 runs this"):
    hosts.join_hosts()


def found(monkeypatch):
  jobs = []

  class Found(Exception):
    pass

  def connect(job, *patience):
    jobs.append(job)
    raise Found

  monkeypatch.setattr(hosts, "_connect", connect)
  with pytest.raises(Found):
    hosts.join_hosts()
  return jobs[0]


def test_slurm(variables, monkeypatch):
  variables(**SLURM, SLURM_STEP_NUM_TASKS="2")
  assert found(monkeypatch) == hosts.Job(f"node01:{7 + 65536 - 4096}", 2, 1, [0])


@pytest.fixture
def tpu_vm(variables, monkeypatch):
  """A TPU VM with a metadata server, which is all that a Cloud TPU pod gives its hosts to go by."""
  from jax._src import cloud_tpu_init
  from jax._src.clusters import cloud_tpu_cluster

  answers = {}
  monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
  monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (answers[key], 200))
  return answers


def test_a_cloud_tpu_pod(tpu_vm, monkeypatch):
  endpoints = "w:0:127.0.0.1,w:1:127.0.0.2,w:2:127.0.0.3,w:3:127.0.0.4"
  tpu_vm |= {"agent-worker-number": "2", "worker-network-endpoints": endpoints, "tpu-env": "ZONE: 'somewhere'"}
  assert found(monkeypatch) == hosts.Job("127.0.0.1:8482", 4, 2)


def test_several_slices_of_a_cloud_tpu(tpu_vm, monkeypatch):
  environment = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '127.0.0.9'"
  endpoints = "w:0:127.0.0.1,w:1:127.0.0.2"
  tpu_vm |= {"agent-worker-number": "1", "worker-network-endpoints": endpoints, "tpu-env": environment}
  assert found(monkeypatch) == hosts.Job("127.0.0.9:8482", 4, 3)


def test_a_tpu_vm_by_itself(tpu_vm):
  tpu_vm |= {"agent-worker-number": "0", "worker-network-endpoints": "w:0:127.0.0.1", "tpu-env": ""}
  hosts.join_hosts()


def test_a_tpu_vm_without_a_metadata_server(tpu_vm, monkeypatch, caplog):
  def nobody(key):
    raise ConnectionError("no route")  # as requests' own is an OSError

  monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", nobody)
  hosts.join_hosts()
  assert "no metadata server answers, so this TPU host is taken to be alone: no route" in caplog.text


def test_a_coordinator_that_does_not_answer():
  job = hosts.Job(f"127.0.0.1:{free_port()}", 2, 1)
  began = time.monotonic()
  with pytest.raises(ConfigError, match=rf"process 0 does not answer at {job.address} within 1 s .*refused"):
    hosts._connect(job, 4.0, 1.0)
  assert time.monotonic() - began < 5


def test_a_coordinator_whose_port_is_taken():
  with socket.socket() as other:
    other.bind(("0.0.0.0", 0))
    other.listen()
    port = other.getsockname()[1]
    with pytest.raises(ConfigError, match=f"port {port}, where the processes shall meet, is taken"):
      hosts._connect(hosts.Job(f"127.0.0.1:{port}", 2, 0), 4.0, 1.0)

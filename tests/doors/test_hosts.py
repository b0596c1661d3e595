"""Two processes of one job: they train as one does, and what only one of them knows leads neither astray."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest


def rows(run):
  path = run / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run):
  return {row["step"]: row["loss"] for row in rows(run) if "loss" in row}


def start(job, run, data, *flags, program="from jaxllm.train import main", **environment):
  """The train door in a process of its own; `program` is run before it."""
  flags = [f"--config={job}", f"--workdir={run}", f"--config.mesh.data={data}", *flags]
  environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"} | environment
  program = f"import sys\n{program}\nfrom jaxllm.cli import run_door\nsys.exit(run_door(main))"
  command = [sys.executable, "-c", program, *flags]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(job, run, *flags, of_one=(), program="from jaxllm.train import main", data=2):
  """Both processes of a job; `of_one` are flags that only the second is given."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
  return [
    start(job, run, data, *flags, *(of_one if i else ()), program=program, **cluster, JAX_PROCESS_ID=str(i))
    for i in range(2)
  ]


def ends(processes, code=0):
  """What they printed: (stdout, stderr) each."""
  said = [process.communicate(timeout=240) for process in processes]
  assert [process.returncode for process in processes] == [code] * len(processes), said
  # XLA's own word on how many processes it found
  return [("".join(x for x in out.splitlines(True) if not x.startswith("[Gloo]")), err) for out, err in said]


def wait_for_step(process, run, step, seconds=120):
  deadline = time.monotonic() + seconds
  while max(losses(run), default=0) < step:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, f"step {step} did not come in {seconds} s"
    time.sleep(0.02)


CONSTANT = "--config.optimizer.schedule=constant"


@pytest.mark.slow
def test_two_processes_and_then_one_train_as_one_does(job, tmp_path):
  said = ends(start_two(job, tmp_path / "two", CONSTANT, "--config.training.steps=4"))
  assert "step 4/4" in said[0][0] and said[1][0] == "", "the first process alone reports"
  for run in ("two", "one"):
    ends([start(job, tmp_path / run, 1, CONSTANT)])
  two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
  assert two.keys() == one.keys()
  assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
  two_bits, one_bits = (rows(tmp_path / run)[-1]["eval/bits_per_byte"] for run in ("two", "one"))
  assert two_bits == pytest.approx(one_bits, rel=1e-4)


@pytest.mark.parametrize(
  "shared", [["--config.mesh.fsdp=2"], ["--config.mesh.expert=2", "--config.model.moe.num_experts=4"]]
)
def test_two_processes_that_share_the_weights_write_samples(job, tmp_path, shared):
  """Each holds half of every matrix, or half of the experts; the text is what the finished model writes alone."""
  from jaxllm import SamplingParams, load_model

  prompts = '--config.training.sample_prompts=("ab", "c d")'
  flags = ["--config.training.steps=2", "--config.training.sample_every=1", *shared, prompts]
  ends(start_two(job, tmp_path / "run", *flags, data=1))
  model = load_model(tmp_path / "run")
  sampling = SamplingParams(temperature=0.8, max_tokens=8, seed=0)
  want = [one.text for one in model.generate(["ab", "c d"], sampling)]
  files = sorted((tmp_path / "run" / "samples").glob("*.txt"))
  assert [file.name[:8] for file in files] == ["00000001", "00000002"]
  assert files[-1].read_text() == "".join(f"----- {p!r}\n{p}{text}\n" for p, text in zip(("ab", "c d"), want))


# The file system and the data of one host are slower than the other's.
DELAYS = """
import os, pathlib, random, time
index = int(os.environ["JAX_PROCESS_ID"])
def slow(function, seconds):
  def call(*args, **kwargs):
    time.sleep(seconds * random.random())
    return function(*args, **kwargs)
  return call
if index == 0:
  pathlib.Path.rename = slow(pathlib.Path.rename, 1.4)
  pathlib.Path.replace = slow(pathlib.Path.replace, 0.7)
else:
  pathlib.Path.mkdir = slow(pathlib.Path.mkdir, 0.7)
  from jaxllm.data.pipeline import TrainBatches
  TrainBatches.__next__ = slow(TrainBatches.__next__, 0.05)
from jaxllm.train import main
"""


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_a_signal_to_one_process_stops_both_at_one_step(job, tmp_path, told):
  """At a random moment, among saves and evaluations, with one host behind the other; and both go on afterwards."""
  flags = [
    "--config.training.steps=40", "--config.checkpoint.every=3", "--config.training.eval_every=5", CONSTANT,
  ]  # fmt: skip
  run = tmp_path / "run"
  pair = start_two(job, run, *flags, program=DELAYS)
  wait_for_step(pair[0], run, random.randint(1, 12))
  time.sleep(random.random())
  pair[told].send_signal(signal.SIGTERM)
  out = ends(pair)[0][0]
  last = max(losses(run))
  assert f"stopped at step {last}" in out and last < 40
  assert (run / "checkpoints" / str(last) / "manifest.json").exists()
  ends(start_two(job, run, *flags, "--config.training.steps=41"))
  assert list(losses(run)) == list(range(1, 42))


@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.training.steps=7", "training.steps is 6 on process 0 and 7 on process 1"),
    ("--workdir=elsewhere", "--workdir is"),
  ],
)
def test_processes_that_are_told_different_things_do_not_start(job, tmp_path, flag, message):
  for _, err in ends(start_two(job, tmp_path / "run", of_one=[flag]), code=2):
    errors = [line for line in err.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith("process ") and message in errors[0], err
  assert not (tmp_path / "run").exists()


def test_a_fault_of_one_process_is_said_by_both(job, tmp_path):
  program = """
import os
if os.environ["JAX_PROCESS_ID"] == "1":
  import jaxllm.data.manifest
  from jaxllm.base.errors import DataError
  def open_prepared(config):
    raise DataError("this host has no disk")
  jaxllm.data.manifest.open_prepared = open_prepared
from jaxllm.train import main
"""
  for _, err in ends(start_two(job, tmp_path / "run", program=program), code=2):
    assert "this host has no disk" in err and "Traceback" not in err


def test_steps_are_dispatched_without_waiting_for_the_one_before(job, tmp_path):
  """The processes agree at every step, and no collective of jax's serves for it."""
  program = """
import jax
from jax.experimental import multihost_utils
from jaxllm.training import loop
events = []
class Watched(loop.Run):
  def __post_init__(self):
    super().__post_init__()
    compiled, finish = self.compiled, self.finish
    def dispatch(*args):
      events.append("dispatch")
      return compiled(*args)
    dispatch.memory_analysis = compiled.memory_analysis
    def wait(*args, **kwargs):
      events.append("wait")
      return finish(*args, **kwargs)
    self.compiled, self.finish = dispatch, wait
  def ask(self):
    events.append("agree")
    super().ask()
loop.Run = Watched
allgather = multihost_utils.process_allgather
multihost_utils.process_allgather = lambda *args, **kwargs: (events.append("allgather"), allgather(*args, **kwargs))[1]
import jaxllm.train
def main(argv):
  code = jaxllm.train.main(argv)
  print(*events)
  return code
"""
  flags = ["--config.checkpoint.every=0", "--config.training.steps=5"]
  said = ends(start_two(job, tmp_path / "run", *flags, program=program))
  for out, _ in said:
    events = out.splitlines()[-1].split()
    events = events[events.index("dispatch") :]
    assert events[:10] == ["dispatch", "agree"] + ["dispatch", "wait", "agree"] * 2 + ["dispatch", "wait"]
    assert "allgather" not in events[: events.index("wait", 9)]


@pytest.mark.slow
def test_a_tensor_axis_between_two_processes_trains_as_one_process_does(job, tmp_path):
  """Each of them reads all rows; of a batch, too, that the number of processes does not divide."""
  flags = "--config.training.steps=3", "--config.training.batch_size=3"
  ends(start_two(job, tmp_path / "two", *flags, "--config.mesh.data=1", "--config.mesh.tensor=2"))
  ends([start(job, tmp_path / "one", 1, *flags)])
  two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
  assert two.keys() == one.keys()
  assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)
  two_bits, one_bits = (rows(tmp_path / run)[-1]["eval/bits_per_byte"] for run in ("two", "one"))
  assert two_bits == pytest.approx(one_bits, rel=1e-4)


def test_a_bad_step_is_saved_before_anybody_leaves(job, tmp_path):
  """Though the process that commits the save is slow, and another one has nothing left to do."""
  program = """
import os, time
if os.environ["JAX_PROCESS_ID"] == "0":
  import jaxllm.storage.manifest as manifests
  write = manifests.write
  manifests.write = lambda *args: (time.sleep(4), write(*args))[1]
from jaxllm.train import main
"""
  flags = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=None", "--config.optimizer.name=sgd"]
  run = tmp_path / "run"
  for _, err in ends(start_two(job, run, *flags, "--config.checkpoint.every=0", program=program), code=2):
    assert "is bad" in err and "Traceback" not in err
  bad = int(err.split(": step ")[1].split()[0])
  assert (run / "checkpoints" / str(bad - 1) / "manifest.json").exists()

"""The contract of resuming: a killed run continues as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest


def metrics(run):
  """step -> loss; a line cut off by the kill is not there yet."""
  losses = {}
  if (run / "metrics.jsonl").exists():
    for line in (run / "metrics.jsonl").read_text().splitlines():
      try:
        row = json.loads(line)
      except json.JSONDecodeError:
        continue
      if "loss" in row:
        assert row["step"] not in losses, "a step is in the curve twice"
        losses[row["step"]] = row["loss"]
  return losses


def start(job, run, *flags):
  command = [sys.executable, "-m", "jaxllm.train", f"--config={job}", f"--workdir={run}", *flags]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(process, run, step, seconds=120):
  deadline = time.monotonic() + seconds
  while max(metrics(run), default=0) < step:
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline, f"step {step} did not come in {seconds} s"
    time.sleep(0.02)


FLAGS = ["--config.training.steps=60", "--config.checkpoint.every=5", "--config.training.batch_size=8"]


@pytest.fixture(scope="module")
def uninterrupted(job, tmp_path_factory):
  run = tmp_path_factory.mktemp("runs") / "whole"
  process = start(job, run, *FLAGS)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  return metrics(run)


@pytest.mark.slow
def test_killed_twice_the_curve_is_bit_identical(job, uninterrupted, tmp_path):
  run = tmp_path / "killed"
  for step in (13, 34):
    process = start(job, run, *FLAGS)
    wait_for_step(process, run, step)
    process.kill()
    process.wait()
  process = start(job, run, *FLAGS)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  assert "resuming from step" in out
  assert metrics(run) == uninterrupted


@pytest.mark.slow
def test_on_another_mesh_the_curve_agrees(job, uninterrupted, tmp_path):
  run = tmp_path / "moved"
  process = start(job, run, *FLAGS)
  wait_for_step(process, run, 20)
  process.kill()
  process.wait()
  mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
  process = start(job, run, *FLAGS, *mesh)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  moved = metrics(run)
  assert moved.keys() == uninterrupted.keys()
  for step, loss in uninterrupted.items():
    assert moved[step] == pytest.approx(loss, abs=2e-4), step


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_exits_with_0(job, uninterrupted, tmp_path, number):
  run = tmp_path / "signalled"
  process = start(job, run, *FLAGS)
  wait_for_step(process, run, 7)
  os.kill(process.pid, number)
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0, out
  last = max(metrics(run))
  assert (run / "checkpoints" / str(last) / "manifest.json").exists()
  assert f"stopped at step {last}" in out and f"--workdir={run}" in out
  process = start(job, run, *FLAGS)
  out, _ = process.communicate(timeout=300)
  assert process.returncode == 0, out
  assert metrics(run) == uninterrupted

"""Of two trainers in one run directory the second is told who is first, and harms nothing."""

import re
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_the_second_trainer_is_refused_until_the_first_is_dead(job, tmp_path):
  run = tmp_path / "run"
  command = [sys.executable, "-m", "jaxllm.train", f"--config={job}", f"--workdir={run}"]
  long = [*command, "--config.training.steps=1000000"]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  first = subprocess.Popen([*long, "--config.data.workers=2"], **pipes)  # whose worker processes outlive it
  try:
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/*/manifest.json")):
      assert first.poll() is None, first.communicate()[0]
      assert time.monotonic() < deadline
      time.sleep(0.05)
    second = subprocess.run(long, capture_output=True, text=True)
    assert second.returncode == 2
    said = rf"error: {run} is in use by pid {first.pid} on host \S+ since .*jaxllm.train .*"
    assert re.fullmatch(said, second.stderr.splitlines()[-1])
    assert first.poll() is None
  finally:
    first.send_signal(signal.SIGKILL)
    first.wait()
  third = subprocess.Popen(long, **pipes)
  for line in third.stdout:
    if line.startswith("resuming from step "):
      break
  else:
    raise AssertionError("the third did not resume")
  third.send_signal(signal.SIGTERM)
  assert third.wait(60) == 0

"""Fine-tuning that is killed with -9 goes on as if it had not been: every figure and every weight, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxllm.storage.reading import committed_steps, open_params

LORA = ["--config.peft.kind=lora", "--config.peft.rank=2"]
DPO = ["--config.data.task=preference", "--config.data.packing=none", "--config.objective.name=dpo"]
EVERY = [
  "--config.training.steps=24",
  "--config.training.eval_every=6",
  "--config.training.early_stopping.patience=9",
  "--config.checkpoint.every=1",
  "--config.checkpoint.keep_last=3",
  "--config.optimizer.learning_rate=0.003",
]
JOBS = {
  "sft": LORA,
  "dpo, cached": [*LORA, *DPO, "--config.objective.cache_reference=True"],
}


@pytest.fixture
def job(chat_job, tmp_path, door):
  """prepared(flags): the config file of chat, or of pairs, prepared."""

  def prepared(flags):
    if "--config.data.task=preference" in flags:
      rows = [{"prompt": f"{n}+1?", "chosen": f"it is {n + 1}", "rejected": f"no {n + 2}"} for n in range(40)]
      (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
      config = tmp_path / "sft.py"
      config.write_text(config.read_text().replace(', format="alpaca", columns=columns', ""))
    code, _, err = door("prepare", chat_job, *flags)
    assert code == 0, err
    return chat_job

  return prepared


def start(job, run, flags):
  command = [sys.executable, "-m", "jaxllm.train", job, f"--workdir={run}", *flags]
  one = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
  return subprocess.Popen(command, env=one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ends(process):
  out, _ = process.communicate(timeout=240)
  assert process.returncode == 0, out
  return out


def kill_when(process, condition, seconds=120):
  """Kills the process with -9 as soon as the condition holds."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.stdout.read()
    assert time.monotonic() < deadline
    time.sleep(0.0005)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()


def newest(run):
  return max(committed_steps(run / "checkpoints"), default=0)


def unfinished(run):
  """Steps that are being written."""
  places = (run / "checkpoints").glob("*")
  return [place for place in places if place.name.isdigit() and not (place / "manifest.json").exists()]


def figures(run):
  """All that metrics.jsonl says, but times and memory; no step may be there twice."""
  found = {}
  for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
    for name in line.keys() - {"step", "tokens_per_second", "step_time_s", "memory_gib"}:
      assert (line["step"], name) not in found, "a figure is there twice"
      found[line["step"], name] = line[name]
  return found


def weights(run):
  return {name: array.read().tobytes() for name, array in open_params(run / "checkpoints").items()}


def check_same(killed, whole):
  assert figures(killed) == figures(whole)
  ours, theirs = weights(killed), weights(whole)
  assert ours == theirs and len(ours) >= 14
  assert any(np.frombuffer(array, np.float32).any() for name, array in ours.items() if name.endswith("/b"))
  for name in ("scores.npz", "best.json", "start.json"):
    assert (killed / name).exists() == (whole / name).exists()
    assert not (whole / name).exists() or (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo, cached"])
def test_killed_twice(job, tmp_path, name):
  """Once between two checkpoints that are on disk, once while one is being written."""
  flags = [*EVERY, *JOBS[name]]
  config = job(flags)
  ends(start(config, tmp_path / "whole", flags))
  run = tmp_path / "killed"
  process = start(config, run, flags)
  kill_when(process, lambda: newest(run) >= 5)
  for _ in range(5):
    process = start(config, run, flags)
    kill_when(process, lambda: newest(run) >= 9 and unfinished(run))
    if unfinished(run):
      break
  assert unfinished(run) and newest(run) < 24, "no kill has met a checkpoint that was being written"
  assert "resuming from step" in ends(start(config, run, flags))
  check_same(run, tmp_path / "whole")


class Killed(BaseException):
  """What nothing in a run catches."""


@pytest.mark.parametrize("name", ["sft"])
def test_ended_twice(job, tmp_path, monkeypatch, name):
  """The quick form, in this process: the run ends before a step's metrics are read, and once before it is saved."""
  from jaxllm.config import load_config
  from jaxllm.training import loop

  flags = [*EVERY, *JOBS[name], "--config.training.steps=6", "--config.training.eval_every=2"]
  path = job(flags).removeprefix("--config=")
  run = load_config(path, [tuple(flag.removeprefix("--config.").split("=")) for flag in flags])
  loop.train(run, tmp_path / "whole")
  for method, step in (("finish", 3), ("save", 5)):
    whole = getattr(loop.Run, method)

    def ended(self, *arguments, whole=whole, step=step):
      if self.step >= step:
        raise Killed
      whole(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
      patched.setattr(loop.Run, method, ended)
      loop.train(run, tmp_path / "killed")
    assert newest(tmp_path / "killed") in (step - 2, step - 1)
  loop.train(run, tmp_path / "killed")
  check_same(tmp_path / "killed", tmp_path / "whole")

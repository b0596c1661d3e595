"""Ctrl-C and the signals of schedulers, at a few moments of doors; `tools/interrupting.py` does it at many."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("interrupting", Path(__file__).parents[2] / "tools" / "interrupting.py")
interrupting = importlib.util.module_from_spec(spec)
sys.modules["interrupting"] = interrupting
spec.loader.exec_module(interrupting)
INT, TERM, HUP, USR1, USR2 = (getattr(signal, f"SIG{name}") for name in ("INT", "TERM", "HUP", "USR1", "USR2"))


def interrupt(door, after, signals, **options):
  path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
  environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": "cpu"}
  return interrupting.interrupt(
    [sys.executable, "-m", f"jaxllm.{door[0]}", *map(str, door[1:])], after, signals, environment=environment, **options
  )


def training(job, run, *flags, steps=100_000):
  return ("train", f"--config={job}", f"--workdir={run}", f"--config.training.steps={steps}", *flags)


def began(line):
  return line.startswith("step 1/")


@pytest.mark.parametrize("after, number", [(0.15, INT), (0.4, INT), (0.8, TERM), (1.2, INT)])
def test_before_there_is_anything_to_save(job, tmp_path, after, number):
  """In the middle of imports for the most part. (The first 0.05 s are Python's own.)"""
  found = interrupt(training(job, tmp_path / "run"), after, [number])
  if found.code == -number and all("<frozen" in line for line in found.lines if line.startswith("  File ")):
    return  # a busy machine is still starting Python, where nothing of ours runs
  assert (found.code, found.lines[-1]) in ((128 + number, "stopped"), (0, found.lines[-1])), found
  assert not any("Traceback" in line for line in found.lines), found.lines


@pytest.mark.parametrize("signals", [[INT], [HUP], [USR2], [TERM, INT]], ids=str)
def test_a_run_is_saved(job, tmp_path, signals):
  found = interrupt(training(job, tmp_path / "run"), began, signals, look_at=[tmp_path])
  assert found.code == 0 and "which is saved; to go on: python -m jaxllm.train" in found.output, found
  assert any(path.endswith("manifest.json") and "/checkpoints/" in path for path in found.left)
  assert not any("Traceback" in line for line in found.lines), found.lines


def test_the_same_signal_twice_ends_it_at_once(job, tmp_path):
  slow = "--config.checkpoint.asynchronous=False"
  found = interrupt(training(job, tmp_path / "run", slow), began, [INT, INT], between_s=0.05)
  assert found.code in (130, 0) and "Traceback" not in "".join(found.lines), found  # 0: it had saved by then


def test_usr1_saves_and_the_run_goes_on(job, tmp_path):
  flags = ["--config.checkpoint.every=0", "--config.training.eval_every=0"]
  found = interrupt(training(job, tmp_path / "run", *flags, steps=60), began, [USR1])
  assert found.code == 0 and "is saved, as SIGUSR1 asks; the run goes on" in found.output, found
  assert "done: step 60" in found.output


def test_what_the_parent_ignores_stays_ignored(job, tmp_path):
  """As under nohup, or in the background of a shell."""
  found = interrupt(training(job, tmp_path / "run", steps=20), began, [INT, HUP], ignored=[INT, HUP])
  assert found.code == 0 and "done: step 20" in found.output, found


@pytest.mark.parametrize("signals", [[INT], [TERM, INT]], ids=str)
def test_text_is_cut_short(job, tmp_path, door, signals):
  run = tmp_path / "run"
  assert door(*training(job, run, "--config.training.sample_every=0", steps=1))[0] == 0
  command = ("generate", f"--model={run}", "--prompt=a", "--num-samples=400", "--max-tokens=60", "--ignore-eos")
  for after in (1.0, 2.5):
    found = interrupt(command, after, signals, look_at=[tmp_path])
    assert found.code in [128 + number for number in signals] and found.lines[-1] == "stopped" and not found.left, found
    assert not any("Traceback" in line or "Fatal" in line for line in found.lines), found.lines

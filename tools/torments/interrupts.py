"""Signals at random moments of every door: it ends with one line and their exit code, or had ended; nobody is left."""

import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator

from interrupting import Outcome, interrupt

from torments.corruptions import Row, leftovers
from torments.world import World, write_job

SIGNALS = {
  "Ctrl-C": (signal.SIGINT,),
  "SIGTERM": (signal.SIGTERM,),
  "SIGTERM and SIGINT": (signal.SIGTERM, signal.SIGINT),
}


def interrupted(world: World, rounds: int, seed: int) -> Iterator[Row]:
  """Each of `rounds` moments with another signal, for each door."""
  draw = random.Random(f"{seed} interrupts")
  place = world.root / "interrupted"
  for name, argv in _doors(world, place).items():
    command = [sys.executable, "-m", f"jaxllm.{name}", *argv]
    _cleared(world, place)
    started = time.monotonic()
    whole = interrupt(command, 120.0, ())
    took = time.monotonic() - started
    if whole.code != 0:
      raise SystemExit(f"{name} fails without a signal: {whole.lines[-1:]}")
    for number in range(rounds):
      _cleared(world, place)
      kind = list(SIGNALS)[number % len(SIGNALS)]
      after = draw.uniform(0.05, took)
      found = interrupt(command, after, SIGNALS[kind], between_s=draw.choice([0, 0.05]))
      result = _judged(name, found)
      if result != "finished" and name != "train" and (left := leftovers(place)):
        result = f"left behind: {left[0]}"
      last = found.lines[-1] if found.lines else ""
      yield Row("interrupted", name, result, f"{kind} after {after:.2f} of {took:.1f} s: exit {found.code}: {last}")
  shutil.rmtree(place, ignore_errors=True)


def _cleared(world: World, place) -> None:
  shutil.rmtree(place, ignore_errors=True)
  write_job(place, world.corpus)


def _doors(world: World, place) -> dict[str, list[str]]:
  return {
    "prepare": [f"--config={place / 'job.py'}"],
    "train": [f"--config={world.config}", f"--workdir={place / 'run'}", "--config.training.steps=60"],
    "generate": [f"--model={world.run}", "--prompt=abc", "--max-tokens=200"],
    "evaluate": [f"--model={world.run}", "--baselines"],
    "convert": [f"--from={world.run}", f"--to={place / 'hf'}", "--format=hf"],
    "bench": ["generate", f"--model={world.run}", "--batch=1", "--prompt-tokens=16", "--max-tokens=16"],
  }


def _judged(name: str, found: Outcome) -> str:
  if any("Traceback" in line for line in found.lines):
    return "traceback"
  if found.code is None:
    return "hang"
  if found.code < 0:
    # Before Python has started there is nobody who could say a word.
    return "stopped" if -found.code in (signal.SIGINT, signal.SIGTERM) and not found.lines else f"crash {-found.code}"
  if found.code == 0:
    return "finished"
  if found.code in (130, 143) and found.lines[-1:] == ("stopped",):
    return "stopped"
  return f"exit code {found.code}"

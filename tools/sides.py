"""Frameworks beside each other: each in its own process, taking turns, while the machine is watched."""

import json
import os
import pathlib
import platform
import subprocess
import time

TOOLS = pathlib.Path(__file__).parent


def machine_seconds() -> float:
  """CPU seconds that all processes of this machine have used (Linux)."""
  fields = [int(x) for x in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
  return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
  """The processor's name, with the features that decide its speed (Linux)."""
  lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  facts = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
  facts = {key.strip(): value.strip() for key, value in facts.items()}
  features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
  return f"{facts.get('model name', platform.machine())} ({', '.join(features)})"


def machine() -> dict[str, str]:
  """Where and of which commit figures are."""
  command = ["git", "-C", str(TOOLS), "rev-parse", "HEAD"]
  commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
  return {"machine": f"{cpu_name()}, {os.cpu_count()} cores", "commit": commit}


class Side:
  """One framework in its own process, idle on a pipe while another one runs.

  The script gets its settings as JSON. It prints its version in a line, and for each number of steps that it reads
  one of JSON: the `times` and `losses` of these steps, and whatever else; the last such answer is kept.
  """

  def __init__(self, name: str, python: str, script: pathlib.Path, settings: dict):
    self.name, self.rounds, self.losses, self.foreign, self.answer = name, [], [], [], {}
    command = [python, str(script), json.dumps(settings)]
    path = os.pathsep.join([str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    self.version = self._read()

  def _read(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")
    return json.loads(line)

  def own_seconds(self) -> float:
    fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

  def run(self, steps: int, record: bool = True) -> None:
    began, others = time.perf_counter(), machine_seconds() - self.own_seconds()
    self.process.stdin.write(f"{steps}\n")
    self.process.stdin.flush()
    self.answer = self._read()
    self.losses += self.answer["losses"]
    if record:
      self.rounds.append(self.answer["times"])
      self.foreign.append((machine_seconds() - self.own_seconds() - others) / (time.perf_counter() - began))

  def end(self) -> None:
    self.process.stdin.close()
    self.process.wait()


def take_turns(sides: list[Side], rounds: int, steps: int) -> None:
  """So many rounds in which each side takes so many steps, after three that compile and warm up; then all end."""
  for side in sides:
    side.run(3, record=False)
  for _ in range(rounds):
    for side in sides:
      side.run(steps)
  for side in sides:
    side.end()


def quiet_rounds(sides: list[Side], most: float) -> list[int]:
  """The rounds during which other programs used at most so many cores."""
  return [i for i in range(len(sides[0].rounds)) if max(side.foreign[i] for side in sides) <= most]

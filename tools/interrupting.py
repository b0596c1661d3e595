"""Starts a command, sends it signals at chosen moments, and tells how it ended: Ctrl-C and schedulers, imitated.

As a terminal does, the signals go to the command's whole process group. The command begins with all of them at their
defaults, whatever its parent ignores (a job in a shell's background ignores Ctrl-C, and hands that on).

  python tools/interrupting.py --signals=INT -- python -m jaxllm.generate --model=runs/quickstart --prompt=a
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a command ended.

  code: its exit code, negative where a signal killed it; None: it did not end. seconds: from the first signal to the
  end. lines: of stderr that are not empty. left: files that are there now and were not before, of those looked at.
  """

  code: int | None
  seconds: float
  lines: tuple[str, ...]
  output: str
  left: tuple[str, ...] = ()


def interrupt(
  command: Sequence[str],
  after_s: float | Callable[[str], bool],
  signals: Sequence[int] = (signal.SIGINT,),
  *,
  between_s: float = 0.0,
  look_at: Sequence[Path] = (),
  environment: Mapping[str, str] | None = None,
  ignored: Sequence[int] = (),
  patience_s: float = 120.0,
  group: bool = True,
) -> Outcome:
  """Runs a command and sends it signals.

  Args:
    after_s: when, in seconds from its start; or whether a line of its output is the moment.
    between_s: between one signal and the next.
    look_at: folders in which files may be left behind.
    ignored: signals that the command is to begin with as ignored.
    patience_s: how long it may take to end; then it is killed.
    group: whether all processes of its group get the signals, as from a terminal; else the first alone, as by kill(1).
  """
  # Between fork and exec, in a parent that may have threads, nothing of ours should run: so a program does it.
  reset = "import os, signal, sys\n" + "".join(
    f"signal.signal({number:d}, signal.{'SIG_IGN' if number in ignored else 'SIG_DFL'})\n" for number in STOPS
  )
  start = [sys.executable, "-I", "-S", "-c", reset + "os.execvp(sys.argv[1], sys.argv[1:])"]
  before = _files(look_at)
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
  process = subprocess.Popen([*start, *command], env=environment, start_new_session=True, **pipes)
  send = os.killpg if group else os.kill
  said = b""
  try:
    if callable(after_s):
      assert process.stdout is not None
      for line in process.stdout:
        said += line
        if after_s(line.decode(errors="replace")):
          break
    else:
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    began = time.monotonic()
    for index, number in enumerate(signals):
      if index:
        time.sleep(between_s)
      with contextlib.suppress(ProcessLookupError):
        send(process.pid, number)
    try:
      out, err = process.communicate(timeout=patience_s)
      code: int | None = process.returncode
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)
      out, err = process.communicate()
      code = None
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # workers that it has left
  lines = tuple(line for line in err.decode(errors="replace").splitlines() if line.strip())
  left = tuple(sorted(_files(look_at) - before))
  return Outcome(code, time.monotonic() - began, lines, (said + out).decode(errors="replace"), left)


def _files(folders: Sequence[Path]) -> set[str]:
  return {str(path) for folder in folders for path in Path(folder).rglob("*")}


def main(argv: Sequence[str]) -> int:
  """Interrupts a command at many moments and prints how often it ended how."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--moments", type=int, default=10, help="how many, evenly from --first to --last")
  parser.add_argument("--first", type=float, default=0.1, metavar="S", help="seconds from the start")
  parser.add_argument("--last", type=float, default=10.0, metavar="S")
  parser.add_argument("--signals", default="INT", help="names with commas between: INT,TERM")
  parser.add_argument("--between", type=float, default=0.0, metavar="S")
  parser.add_argument("command", nargs="+")
  args = parser.parse_args(argv)
  numbers = [getattr(signal, f"SIG{name}") for name in args.signals.split(",")]
  seen: collections.Counter[str] = collections.Counter()
  for index in range(args.moments):
    after = args.first + (args.last - args.first) * index / max(1, args.moments - 1)
    found = interrupt(args.command, after, numbers, between_s=args.between)
    last = found.lines[-1] if found.lines else ""
    print(f"{after:6.2f} s: exit {found.code} after {found.seconds:.2f} s: {last[:120]}", flush=True)
    if any("Traceback" in line for line in found.lines):
      print("  " + "\n  ".join(found.lines[-12:]))
    seen[f"exit {found.code}"] += 1
  print(", ".join(f"{count} x {how}" for how, count in seen.most_common()))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

"""Grain's workers hear no signals, and end with the process that has started them, whatever ended it."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

READER = """
import multiprocessing, pickle, sys
from jaxllm.data.pipeline import train_batches

batches = train_batches(pickle.loads(bytes.fromhex(sys.argv[1])), batch_size=2, seq_len=8, seed=0)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
for _ in sys.stdin:
  for _ in range(20):
    next(batches)
  print("read", flush=True)
"""


def is_alive(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def test_workers_hear_no_signals_and_end_with_their_parent(mixture):
  """A terminal's Ctrl-C, and what a scheduler sends to each process of a job, are for the process that trains."""
  config = dataclasses.replace(mixture, workers=1, prefetch=1)
  command = [sys.executable, "-c", READER, pickle.dumps(config).hex()]
  path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipes) as reader:
    workers = [int(word) for word in reader.stdout.readline().split()]
    assert len(workers) == 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
      os.kill(workers[0], number)
    reader.stdin.write("on\n")
    reader.stdin.flush()
    assert reader.stdout.readline() == "read\n"
    reader.kill()
  deadline = time.monotonic() + 20
  while is_alive(workers[0]) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not is_alive(workers[0])

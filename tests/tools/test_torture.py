"""A few of each torment: nothing is loaded wrongly in silence, no traceback, no hang, and what was killed goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_torture(tmp_path):
  command = [sys.executable, ROOT / "tools" / "torture.py", "--scale=0.01", "--seed=3"]
  environment = os.environ | {"TMPDIR": str(tmp_path)}  # what it makes goes with the test, however it ends
  done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-4000:]
  assert " trials, 0 faults" in done.stdout
  assert not list(tmp_path.glob("torture-*"))

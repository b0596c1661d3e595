"""bench_finetune.py's sides on a tiny random model: they train the same, or the comparison would mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
for module in ("trl", "peft", "transformers"):
  pytest.importorskip(module)


@pytest.mark.slow
def test_both_sides_train_the_same(agrees, tmp_path):
  out = tmp_path / "out.json"
  command = [sys.executable, "tools/bench_finetune.py", "--random=tiny", "--methods=full,lora,dpo", "--length=16"]
  options = ["--batch=2", "--rank=4", "--rounds=1", "--steps=2", f"--out={out}"]
  environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert found["command"].startswith("python tools/bench_finetune.py --random=tiny")
  for one in found["methods"]:
    ours, theirs = one["rows"]
    agrees(f"{one['method']} step of TRL's trainer", "losses of 5 steps", ours["loss_curve"], theirs["loss_curve"])
    assert ours["trained"] == theirs["trained"] and len(ours["loss_curve"]) == 5
    assert one["method"] == "dpo" or ours["loss_curve"][0] != ours["loss_curve"][-1]
    assert ours["frozen_bytes"] == (0 if one["method"] == "full" else 4 * 80192)

"""What the sides of bench_finetune.py share: their batches, and how they look at their own memory."""

import pathlib

import numpy as np

# Our names of the matrices that have adapters, and those of PEFT in a model.layers.N
MODULES = {
  "blocks/attention/query": "self_attn.q_proj",
  "blocks/attention/key": "self_attn.k_proj",
  "blocks/attention/value": "self_attn.v_proj",
  "blocks/attention/output": "self_attn.o_proj",
  "blocks/mlp/gate": "mlp.gate_proj",
  "blocks/mlp/up": "mlp.up_proj",
  "blocks/mlp/down": "mlp.down_proj",
}


def batches(settings: dict) -> list[np.ndarray]:
  """Rows of tokens [B, T], of pairs [2, B, T]: chosen and rejected rows that begin with one prompt."""
  B, T, P = settings["batch"], settings["length"], settings["prompt"]
  rng = np.random.default_rng(1)
  found = []
  for _ in range(16):
    rows = rng.integers(0, settings["vocab"], (2, B, T))
    rows[1, :, :P] = rows[0, :, :P]
    found.append(rows if settings["method"] == "dpo" else rows[0])
  return found


def memory(name: str) -> int:
  """Bytes, of a line of this process's status: VmRSS now, VmHWM at most so far (Linux)."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def forget_peak() -> None:
  """VmHWM begins again at what is in use now."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")


class Peaks:
  """The most memory beyond what the imported framework takes: of loading and compiling too, and of steps alone."""

  def __init__(self):
    self.before, self.whole = memory("VmRSS"), 0

  def warmed_up(self) -> None:
    self.whole = memory("VmHWM") - self.before
    forget_peak()

  def answer(self) -> dict[str, int]:
    steps = memory("VmHWM") - self.before
    return {"peak_bytes": steps, "peak_bytes_with_start": max(steps, self.whole)}

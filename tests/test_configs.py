"""Every config that ships is valid, and its step lowers for the hardware that its docstring names."""

import dataclasses
from pathlib import Path

import jax
import pytest

from jaxllm.config import load_config, load_config_file, sweep_points
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program

CONFIGS = Path(__file__).parent.parent / "configs"
# platform, target, devices
HARDWARE = {
  "quickstart": ("cpu", "cpu", 1),
  "gpt2_124m": ("cuda", "h100", 1),
  "llama_1b": ("cuda", "h100", 1),
  "llama3_8b": ("tpu", "v5p", 8),
  "bert_mlm_tiny": ("cpu", "cpu", 1),
  "t5_span_tiny": ("cpu", "cpu", 1),
  "seq2seq_tiny": ("cpu", "cpu", 1),
  "classify_tiny": ("cpu", "cpu", 1),
}


def test_every_config_is_covered():
  assert {path.stem for path in CONFIGS.glob("*.py")} == HARDWARE.keys()


@pytest.mark.parametrize("name", HARDWARE)
def test_a_config_says_command_hardware_and_time(name):
  doc = load_config_file(str(CONFIGS / f"{name}.py")).__doc__
  for word in (f"configs/{name}.py", "Hardware", "Time"):
    assert word in doc


@pytest.mark.parametrize("name", HARDWARE)
def test_a_config_lowers(name):
  platform, target, devices = HARDWARE[name]
  run = load_config(str(CONFIGS / f"{name}.py"))
  attention = "auto"
  if platform == "cuda":  # cuDNN's lowering needs its library; packed rows take our kernel, of jax 0.11
    attention = "mosaic_gpu" if jax.__version_info__ >= (0, 11) else "xla"
  training = dataclasses.replace(run.training, target=target, attention=attention)
  mesh = make_mesh(run.mesh, jax.devices()[:devices])
  program = make_program(run.model, training, run.optimizer, run.mesh, mesh, run.objective, run.data)
  lowered = program.step.trace(program.state, program.batch).lower(lowering_platforms=(platform,))
  text = lowered.as_text()
  assert len(text) < 3_000_000  # layers are a loop, not copies
  tokens = f"tensor<{training.batch_size}x{training.seq_len}xi32>"
  assert tokens in text
  if devices > 1:
    assert "fsdp" in text


@pytest.mark.parametrize("name", ["quickstart", "gpt2_124m"])
def test_a_configs_sweep_is_valid(name):
  path = str(CONFIGS / f"{name}.py")
  for point in sweep_points(path):
    load_config(path, point.items())

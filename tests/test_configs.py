"""Every config that ships is valid, and its step lowers for the hardware that its docstring names."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.config import load_config, load_config_file, sweep_points
from jaxllm.kernels import backends
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program

sys.path.append(str(Path(__file__).parent / "kernels"))
import cudnn_stand_in

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


# These begin with a model in files, which tests/doors/test_start.py has smaller ones of.
ON_TOP_OF_A_MODEL = {"sft_smollm2": "chat", "dpo_smollm2": "preference"}  # and their tasks


def test_every_config_is_covered():
  assert {path.stem for path in CONFIGS.glob("*.py")} == HARDWARE.keys() | ON_TOP_OF_A_MODEL.keys()


@pytest.mark.parametrize("name", ON_TOP_OF_A_MODEL)
def test_a_config_on_top_of_a_model(name):
  path = CONFIGS / f"{name}.py"
  run = load_config(str(path))
  assert run.model_init.path and run.peft.kind == "lora" and run.data.task == ON_TOP_OF_A_MODEL[name]
  for word in (f"configs/{name}.py", "Hardware", "Time"):
    assert word in load_config_file(str(path)).__doc__


@pytest.mark.parametrize("name", HARDWARE)
def test_a_config_says_command_hardware_and_time(name):
  doc = load_config_file(str(CONFIGS / f"{name}.py")).__doc__
  words = (f"configs/{name}.py", "Hardware", "Time", *(("Kernels",) if HARDWARE[name][0] != "cpu" else ()))
  for word in words:
    assert word in doc


@pytest.mark.parametrize("name", HARDWARE)
def test_a_config_lowers(name, monkeypatch):
  platform, target, devices = HARDWARE[name]
  cudnn_stand_in.allow_lowering(monkeypatch)
  monkeypatch.setattr(backends, "_logged", {})
  run = load_config(str(CONFIGS / f"{name}.py"))
  training, compute = run.training, dataclasses.replace(run.compute, target=target)
  mesh = make_mesh(run.mesh, jax.devices()[:devices])
  program = make_program(run.model, training, run.optimizer, run.mesh, mesh, run.objective, run.data, compute)
  lowered = program.step.trace(*program.arguments).lower(lowering_platforms=(platform,))
  text = lowered.as_text()
  assert len(text) < 3_000_000  # layers are a loop, not copies
  tokens = f"tensor<{training.batch_size}x{training.seq_len}xi32>"
  assert tokens in text
  if devices > 1:
    assert "fsdp" in text
  if platform == "cpu":
    return
  # The kernels that the docstring names.
  attention = "cudnn" if target == "h100" and jax.__version_info__ >= (0, 11, 2) else "xla"
  assert tuple(backends.chosen("packed_attention", target)) == (attention,)
  assert tuple(backends.chosen("cross_entropy", target)) == ("xla",)
  assert ("@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text) == (attention == "cudnn")
  if attention == "cudnn":
    rows = training.batch_size // training.accumulation
    doc = load_config_file(str(CONFIGS / f"{name}.py")).__doc__
    assert f"a mask of {2 * rows * training.seq_len**2 >> 20} MiB" in doc


@pytest.mark.parametrize("name", ["quickstart", "gpt2_124m"])
def test_a_configs_sweep_is_valid(name):
  path = str(CONFIGS / f"{name}.py")
  for point in sweep_points(path):
    load_config(path, point.items())

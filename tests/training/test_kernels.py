"""Which kernels a training step is compiled with: the word for all of them, and what wins over it."""

import dataclasses
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.kernels import backends
from jaxllm.models.config import OPS, Compute, ComputeConfig, ModelConfig, MoEConfig
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training import startup
from jaxllm.training.compile import make_program
from jaxllm.training.config import OptimizerConfig, TrainingConfig

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import cudnn_stand_in

RECENT = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the Pallas kernels need jax 0.11")
MODEL = ModelConfig(
  vocab_size=512, embed_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=256, max_seq_len=256,
  moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=256),
)  # fmt: skip
TRAINING = TrainingConfig(steps=10, batch_size=2, seq_len=256)
COMPUTE = ComputeConfig(dtype="bfloat16", remat="full")


def computes(devices=1, **settings):
  return dataclasses.replace(COMPUTE, **settings).on("cpu", devices)


def test_the_word_is_for_every_op_that_is_left_open():
  assert {getattr(computes(kernels="xla"), op) for op in OPS} == {"xla"}
  assert {getattr(computes(), op) for op in OPS} == {"auto"}
  assert {getattr(computes(devices=8), op) for op in OPS} == {"xla"}  # calls that cannot be split over devices
  mixed = computes(kernels="xla", attention="cpu")
  assert (mixed.attention, mixed.matmul) == ("cpu", "xla")


@RECENT
def test_the_word_for_our_kernels():
  compute = computes(target="h100", kernels="pallas", cross_entropy="xla")
  assert (compute.attention, compute.grouped_matmul, compute.cross_entropy) == ("pallas", "pallas", "xla")


@pytest.mark.parametrize("target", ["cpu", "a100"])
def test_where_there_are_none_it_is_an_error(target):
  with pytest.raises(ConfigError, match=f"kernels is 'pallas'.*not for {target}"):
    computes(target=target, kernels="pallas")
  with pytest.raises(ConfigError, match="kernels is 'pallas'"):
    Compute(target=target, kernels="pallas")


@RECENT
@pytest.mark.parametrize(
  "platform, target, backend, call",
  [("cuda", "h100", "mosaic_gpu", "@mosaic_gpu_v2("), ("tpu", "v5p", "pallas_tpu", "@tpu_custom_call(")],
)
def test_a_step_with_experts_has_our_kernels_for_all_its_ops(platform, target, backend, call, monkeypatch):
  monkeypatch.setattr(backends, "_logged", {})
  compute = dataclasses.replace(COMPUTE, target=target, kernels="pallas")
  mesh = make_mesh(MeshConfig(data=2), jax.devices()[:2])
  program = make_program(MODEL, TRAINING, OptimizerConfig(), MeshConfig(data=2), mesh, compute_config=compute)
  text = program.step.trace(*program.arguments).lower(lowering_platforms=(platform,)).as_text()
  ops = ("packed_attention", "cross_entropy", "grouped_matmul")
  assert {op: tuple(backends.chosen(op, target)) for op in ops} == dict.fromkeys(ops, (backend,))
  # Attention forward, again for the backward pass, and backward; three grouped products each way; the loss.
  assert text.count(call) >= 3 + 3 * 3 + 1
  assert "cudnn" not in text


@pytest.mark.parametrize(
  "target, devices, amx, want",
  [
    ("cpu", 1, True, "bfloat16"),
    ("cpu", 1, False, "float32"),
    ("cpu", 8, True, "float32"),  # the CPU's own kernels serve one device
    ("h100", 8, False, "bfloat16"),
    ("a100", 1, False, "bfloat16"),
    ("v5e", 4, False, "bfloat16"),
    ("gpu", 1, False, "float32"),
  ],
)
def test_dtype_auto_is_bfloat16_where_the_chip_has_hardware_for_it(target, devices, amx, want, monkeypatch):
  monkeypatch.setattr(backends.cpu_ffi, "cpu_flags", lambda: {"amx_bf16"} if amx else set())
  monkeypatch.setattr(backends.cpu_ffi, "available", lambda: True)
  assert ComputeConfig(dtype="auto").on(target, devices).dtype == want


def test_gradients_are_summed_in_float32_or_as_computed():
  assert ComputeConfig(dtype="bfloat16", reduce_dtype="bfloat16").on("cpu", 1).reduce_dtype == "bfloat16"
  with pytest.raises(ConfigError, match=r"compute\.reduce_dtype is 'bfloat16' and compute\.dtype 'float32'"):
    ComputeConfig(reduce_dtype="bfloat16").on("cpu", 1)


@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="cuDNN's packed layout needs jax 0.11.2")
def test_a_step_with_the_packed_layout_lowers(monkeypatch):
  """Under shard_map, in the loop over layers, with and without rematerialization: one call each way and a fallback."""
  cudnn_stand_in.allow_lowering(monkeypatch)
  mesh_config = MeshConfig(data=2, tensor=2)
  mesh = make_mesh(mesh_config, jax.devices()[:4])
  for remat, forward in (("none", 1), ("full", 2)):
    compute = dataclasses.replace(COMPUTE, target="h100", attention="cudnn_packed", remat=remat)
    model = dataclasses.replace(MODEL, moe=None)
    program = make_program(model, TRAINING, OptimizerConfig(), mesh_config, mesh, compute_config=compute)
    text = program.step.trace(*program.arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == forward and text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


def test_the_startup_table_says_why(monkeypatch):
  said = {
    ("packed_attention", "h100", "cudnn", "mosaic_gpu: not measured on this chip"): None,
    ("matmul", "h100", "xla", ""): None,
    ("matmul", "cpu", "cpu", ""): None,
  }
  monkeypatch.setattr(backends, "_logged", said)
  want = "attention within segments: cudnn (mosaic_gpu: not measured on this chip), matmul: xla"
  assert startup.kernels_in_use("h100") == want

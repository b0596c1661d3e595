"""What devices send one another in a whole compiled train step, on every axis of the mesh."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program
from jaxllm.training.config import OptimizerConfig, TrainingConfig

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import hlo

D, T, V, L, ROWS = 32, 64, 384, 3, 16  # no other dimension of the model is V, no product of others is it
MODEL = ModelConfig(
  vocab_size=V, embed_dim=D, num_layers=L, num_heads=8, mlp_dim=64, max_seq_len=T, tie_embeddings=False
)
# Kinds of collectives by axis. Rows split over an axis need their gradients summed; weights split over fsdp are
# gathered besides, and their gradients may be scattered; the tensor axis sums the layers' outputs, and the head's loss,
# whose positions it splits, gathers the head and scatters its gradient.
PROMISE = {
  "data": {"all-reduce"},
  "expert": {"all-reduce"},
  "fsdp": {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"},
  "tensor": {"all-reduce", "all-gather", "reduce-scatter"},
}
# Of the context axis nothing is promised but the head's loss: attention on a CPU is the compiler's to split.
MESHES = [
  dict(data=8),
  dict(fsdp=8),
  dict(expert=8),
  dict(context=8),
  dict(tensor=8),
  dict(data=2, fsdp=2, tensor=2),
]


def collectives(sizes, devices=None, platform="cpu", model=MODEL, **compute):
  config = MeshConfig(**({"data": 1} | sizes))
  mesh = make_mesh(config, devices)
  training = TrainingConfig(steps=10, batch_size=ROWS, accumulation=2, seq_len=model.max_seq_len)
  compute_config = ComputeConfig(unroll_layers=1, **compute)
  program = make_program(model, training, OptimizerConfig(), config, mesh, compute_config=compute_config)
  lowered = program.step.trace(*program.arguments).lower(lowering_platforms=(platform,))
  quick = {"xla_backend_optimization_level": 0} if platform == "cpu" else None  # LLVM's part is not looked at
  return hlo.collectives(lowered.compile(compiler_options=quick).as_text(), mesh)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_axis_sends_what_it_promises(sizes, monkeypatch):
  from jaxllm.kernels.head_loss import reference

  monkeypatch.setattr(reference, "CPU_ROWS", 16)  # else a device's tokens are one chunk
  found = collectives(sizes)
  assert found and not any("head loss" in one.loops for one in found)
  if "context" in sizes:
    return
  for one in found:
    assert all(one.kind in PROMISE[axis] for axis in one.axes), one
    if one.kind == "all-gather" and one.loops == ("micro-batches", "layers"):
      assert one.axes == ("fsdp",), one  # weights; the layers' activations lie where they are needed
    if one.kind == "all-to-all":  # the tokens of a lookup, whose gradient's columns are added up by one device each
      assert one.file == "models/weights.py" and one.loops == ("micro-batches",), one
    if one.kind == "all-gather" and one.axes == ("fsdp",):
      assert one.bytes <= 4 * D * V  # the largest weight: no tokens
    if one.file.startswith(("kernels/head_loss", "parallel/head_loss")):  # no tokens there but x's gradient, once
      whole = one.axes == ("tensor",) and one.kind == "all-gather" and one.times == 2
      assert one.bytes <= 4 * (max(D * V, ROWS // 2 * T * D) if whole else D * V), one


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="compiling for TPU needs libtpu")
@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=4)], ids=str)
def test_step_compiled_for_a_tpu(sizes, monkeypatch):
  """With micro-batches and 16-bit weights, on whose gradient's rounding libtpu's compiler once failed."""
  from jaxllm.kernels.head_loss import reference
  from jaxllm.parallel.topologies import tpu_mesh

  monkeypatch.setattr(reference, "LOGITS_TPU", 64 * 1024)
  model = ModelConfig(vocab_size=1024, embed_dim=512, num_layers=2, num_heads=4, mlp_dim=512, max_seq_len=256)
  devices = list(tpu_mesh("v5e:2x4").devices.flat)
  found = collectives(sizes, devices, "tpu", model, dtype="bfloat16")
  # libtpu moves the gather of token ids, for the gradient of the lookup, into whatever loop it likes: 4 bytes a token.
  ids = ((("s32", (1, 8, 256)),),)
  assert not any("head loss" in one.loops and one.arrays not in ids for one in found)
  summed = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
  shard = model.vocab_size * model.embed_dim // 8
  assert any(dtype == "f32" and math.prod(shape) >= shard for one in summed for dtype, shape in one.arrays)

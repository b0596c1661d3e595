"""In which dtype devices exchange weights and add up gradients, read off the partitioned program."""

import collections
import re

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from test_program import OPTIMIZER

from jaxllm.models.config import ComputeConfig, ModelConfig, MoEConfig
from jaxllm.parallel.config import MeshConfig
from jaxllm.parallel.mesh import make_mesh
from jaxllm.training.compile import make_program
from jaxllm.training.config import TrainingConfig

# Sizes that tell weights from activations, whose last two dimensions are never both among them.
SIZES = dict(vocab_size=72, embed_dim=48, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=88, max_seq_len=20)
OF_WEIGHTS = {20, 24, 48, 72, 88, 48 // 4}  # the last: a shard of embed_dim on the mesh below
MESH = dict(data=2, fsdp=4)
MODELS = {
  "llama": ModelConfig(**SIZES, tie_embeddings=False),
  "biased": ModelConfig(
    **SIZES, tie_embeddings=True, position="learned", norm="layernorm", mlp="gelu",
    attention_bias=True, attention_out_bias=True, mlp_bias=True,
  ),
  "experts": ModelConfig(**SIZES, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=88)),
  "capacity": ModelConfig(**SIZES, moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=88, capacity_factor=1.25)),
}  # fmt: skip


def collectives(model, training, folder, **compute) -> dict[str, collections.Counter]:
  """ "gathers" and "sums" of whole weights or shards -> how many of each dtype and shape, as XLA splits the program and
  before a CPU, which adds up in 32 bits only, widens them."""
  config = MeshConfig(**MESH)
  compute_config = ComputeConfig(unroll_layers=1, **compute)
  program = make_program(model, training, OPTIMIZER, config, make_mesh(config), compute_config=compute_config)
  lowered = program.step.trace(*program.arguments).lower()
  assert "module @jit_train_step " in lowered.as_text()[:200]
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()  # jax asks the setting once
  try:
    lowered.compile(compiler_options={"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partitioning"})
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
  (path,) = folder.glob("*jit_train_step*after_spmd-partitioning*.txt")
  found = {"gathers": collections.Counter(), "sums": collections.Counter()}
  for results, kind in re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter)\(", path.read_text()):
    for dtype, shape in re.findall(r"(\w+)\[([\d,]+)\]", results):
      dims = tuple(map(int, shape.split(",")))
      if len(dims) > 1 and set(dims[-2:]) <= OF_WEIGHTS:
        found["gathers" if kind == "all-gather" else "sums"][dtype, dims] += 1
  return found


def dtypes(counter):
  return {dtype for dtype, _ in counter}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_weights_travel_in_16_bits_and_gradients_in_32(name, accumulation, tmp_path):
  training = TrainingConfig(batch_size=8 * accumulation, seq_len=16, accumulation=accumulation)
  found = collectives(MODELS[name], training, tmp_path, dtype="bfloat16")
  assert dtypes(found["gathers"]) == {"bf16"} and dtypes(found["sums"]) == {"f32"}, found
  # Forward and backward each gather the layer's seven matrices (the plain MLP has six), and the table once.
  assert sum(found["gathers"].values()) >= 12
  assert sum(found["sums"].values()) >= 7


def test_gradients_in_16_bits_if_asked_for(tmp_path):
  """The sums over the tokens of a table and of the head stay in float32."""
  training = TrainingConfig(batch_size=8, seq_len=16)
  found = collectives(MODELS["llama"], training, tmp_path, dtype="bfloat16", reduce_dtype="bfloat16")
  assert dtypes(found["gathers"]) == {"bf16"}
  assert {shape for dtype, shape in found["sums"] if dtype == "f32"} <= {(72, 12), (12, 72)}
  assert sum(n for (dtype, _), n in found["sums"].items() if dtype == "bf16") >= 7


def test_float32_stays_float32(tmp_path):
  found = collectives(MODELS["llama"], TrainingConfig(batch_size=8, seq_len=16), tmp_path)
  assert dtypes(found["gathers"]) == dtypes(found["sums"]) == {"f32"}

"""The engine's programs for chips that are not here: with kernels inside, and nothing large sent at each step."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

from jaxllm.models.config import ModelConfig

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import compile_inference

PLUGINS = {"v5e": "libtpu", "v6e": "libtpu", "h100": "jax_cuda13_plugin"}
TINY = ModelConfig(
  vocab_size=8192, embed_dim=1024, num_layers=2, num_heads=16, num_kv_heads=8, head_dim=128, mlp_dim=2048,
  max_seq_len=512, tie_embeddings=False,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
  "topology, format",
  [("v5e:2x4", "bfloat16"), ("h100:8", "bfloat16"), ("v5e", "int8"), ("h100", "int4"), ("v6e:2x4", "int4")],
)
def test_steps_of_an_engine(topology, format):
  if importlib.util.find_spec(PLUGINS[topology.partition(":")[0]]) is None:
    pytest.skip("needs the chip's compiler")
  devices = 8 if ":" in topology else 1
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    rows = list(compile_inference.compile_case(topology, format, TINY))
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
  assert [row["program"] for row in rows] == ["decode 1", "decode 32", "prefill 512"]
  # Of the layers. Whoever reads 2,048 inputs has eight blocks of packed codes, one for each device.
  matrices = 2 * (2 * 1024 * 1024 + 5 * 1024 * 2048)
  tables = 2 * 8192 * 1024 * 2  # embedding and head, 16 bits
  bits = {"bfloat16": 16, "int8": 8, "int4": 4}[format]
  for row in rows:
    # Scales, norms and padding on top.
    assert 1 <= row["weights"] / ((matrices * bits / 8 + tables) / devices) < 1.15
    attention = sum(n for name, n in row["kernels"].items() if "attention" in name or "mpmd" in name)
    assert attention >= 2
    products = sum(n for name, n in row["kernels"].items() if "quantized" in name or "mpmd" in name)
    assert format == "bfloat16" or products >= 2 + 14 * ("v" not in topology)
    tokens = int(row["program"].split()[1])
    # Two sums of activations a layer, one of the embedding, and of what is drawn at most some logits: no matrix.
    assert sum(row["collectives"].values()) < 16 * tokens * 1024 * 5 + 33 * 3 * 8192 * 4 + 2**20
    assert (devices == 1) == (not row["collectives"])

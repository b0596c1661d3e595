"""A conversion holds little more than a tensor, however large the model: 520 MB in shards of 100 MB here."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxllm.interop.stored import StoredModel, param_shapes
from jaxllm.interop.tensors import from_parts
from jaxllm.interop.write import write_model
from jaxllm.models.config import ModelConfig

TINY = ModelConfig(vocab_size=32, embed_dim=16, num_layers=2, num_heads=8, mlp_dim=24, max_seq_len=16)
LARGE = ModelConfig(vocab_size=16384, embed_dim=1024, num_layers=20, num_heads=8, mlp_dim=2752, max_seq_len=16)
SHARD = 100_000_000
LARGEST_TENSOR = 16384 * 1024 * 2

# Peak beyond what the process takes once it has done the same with the tiny model. Linux counts the parent's
# memory in a child's ru_maxrss; VmHWM is the process's own.
MEASURE = """
import json, re, sys
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
work, tiny, large = sys.argv[1:4]
def run(source):
  if work == "load":
    import jax
    from jaxllm import load_model
    from jaxllm.parallel.config import MeshConfig
    from jaxllm.parallel.mesh import make_mesh
    return load_model(source, mesh=make_mesh(MeshConfig(data=1, fsdp=8), jax.devices()))
  if work == "params":
    import jax
    from jaxllm.interop.open import open_model
    from jaxllm.parallel.config import MeshConfig
    from jaxllm.parallel.mesh import make_mesh
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    return jax.block_until_ready(open_model(source).params(mesh=mesh))
  from jaxllm.convert import main
  main([f"--from={source}", f"--to={source}-{work}", f"--format={work}", "--max-shard-size=100MB"])
run(tiny)
before = peak()
kept = run(large)
print(json.dumps(peak() - before))
"""


def stored(config):
  block = np.random.default_rng(0).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)

  def tensor(shape):
    axes = 1 if len(shape) > 2 else 0
    part = shape[axes:]
    return from_parts(shape, block.dtype, axes, lambda _: np.resize(block, part))

  return StoredModel(config, {path: tensor(shape) for path, shape in param_shapes(config).items()}, None, {})


pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  for name, config in (("tiny", TINY), ("large", LARGE)):
    for format in ("hf", "jaxllm"):
      write_model(stored(config), folder / f"{name}-{format}", format=format, max_shard_bytes=SHARD)
  return folder


def measure(work, models, source):
  paths = [str(models / f"{size}-{source}") for size in ("tiny", "large")]
  done = subprocess.run(
    [sys.executable, "-c", MEASURE, work, *paths], cwd=Path.cwd(), capture_output=True, text=True, check=True
  )
  return json.loads(done.stdout)


@pytest.mark.parametrize("source, format", [("hf", "jaxllm"), ("jaxllm", "hf"), ("hf", "hf")])
def test_a_conversion(models, source, format):
  assert len(list((models / "large-hf").glob("*.safetensors"))) > 4
  extra = measure(format, models, source)
  print(f"{source} -> {format}: {extra / 1e6:.0f} MB")
  assert extra < 1.3 * SHARD + LARGEST_TENSOR


@pytest.mark.parametrize("work, source", [("load", "hf"), ("load", "jaxllm"), ("params", "hf")])
def test_loading_onto_eight_devices(models, work, source):
  weights = sum(np.prod(shape) * 2 for shape in param_shapes(LARGE).values())
  extra = measure(work, models, source) - weights
  print(f"{source} -> {work} on a mesh: {extra / 1e6:.0f} MB beyond the weights' {weights / 1e6:.0f}")
  assert extra < 1.3 * SHARD + LARGEST_TENSOR

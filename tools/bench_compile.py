"""How long a training step's gradient takes to compile, by depth: `python tools/bench_compile.py`.

A scanned stack compiles one layer however deep it is; on CPU a stack of up to eight layers is unrolled by
default, because straight code runs faster there, and pays for it here. Prints the median of the
repeats without the persistent cache, and the ratio of 48 layers to 6.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.build import declare
from jaxllm.models.config import Compute, ModelConfig

DEPTHS = (6, 12, 48)


def compile_seconds(layers: int, compute: Compute) -> float:
  """CPU seconds from tracing to the executable; wall time says more about a machine's other work."""
  config = ModelConfig(vocab_size=4096, embed_dim=256, num_layers=layers, num_heads=4, max_seq_len=256)
  graph, shapes, _ = declare(config, compute)

  def loss(params, tokens):
    return nnx.merge(graph, params)(tokens)[0].mean()

  jax.clear_caches()
  start = time.process_time()
  jax.jit(jax.grad(loss)).trace(shapes, jax.ShapeDtypeStruct((2, 256), jnp.int32)).lower().compile()
  return time.process_time() - start


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  repeats = parser.parse_args().repeats
  jax.config.update("jax_enable_compilation_cache", False)
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  for name, unroll in (("scanned", 1), ("default", None)):
    compute = Compute(unroll_layers=unroll)
    rounds = [[compile_seconds(layers, compute) for layers in DEPTHS] for _ in range(repeats + 1)]
    medians = [statistics.median(column) for column in zip(*rounds[1:])]  # the first round warms up
    line = ", ".join(f"{layers} layers {s:.2f} s" for layers, s in zip(DEPTHS, medians))
    print(f"{name}: {line}; 48 to 6: {medians[-1] / medians[0]:.2f}x")


if __name__ == "__main__":
  main()

"""How long a training step's gradient takes to compile, by depth: `python tools/bench_compile.py`.

A scanned stack compiles one layer however deep it is; on CPU a stack of up to eight layers is unrolled by
default, because straight code runs faster there, and pays for it here. Prints the median of five
compilations without the persistent cache, and the ratio of 48 layers to 6.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.models.build import declare
from jaxllm.models.config import Compute, ModelConfig


def compile_seconds(layers: int, compute: Compute, repeats: int) -> float:
  """Median seconds from tracing to the executable."""
  config = ModelConfig(vocab_size=4096, embed_dim=256, num_layers=layers, num_heads=4, max_seq_len=256)
  graph, shapes, _ = declare(config, compute)

  def loss(params, tokens):
    return nnx.merge(graph, params)(tokens)[0].mean()

  seconds = []
  for _ in range(repeats):
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(jax.grad(loss)).trace(shapes, jax.ShapeDtypeStruct((2, 256), jnp.int32)).lower().compile()
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  repeats = parser.parse_args().repeats
  jax.config.update("jax_enable_compilation_cache", False)
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  for name, unroll in (("scanned", 1), ("default", None)):
    compute = Compute(unroll_layers=unroll)
    seconds = {layers: compile_seconds(layers, compute, repeats) for layers in (6, 12, 48)}
    line = ", ".join(f"{layers} layers {s:.2f} s" for layers, s in seconds.items())
    print(f"{name}: {line}; 48 to 6: {seconds[48] / seconds[6]:.2f}x")


if __name__ == "__main__":
  main()

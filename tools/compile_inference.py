"""The engine's programs for chips that are not here, compiled ahead of time: memory, kernels, collectives.

    python tools/compile_inference.py                                  # CASES, of Llama 3 8B
    python tools/compile_inference.py --topology=v6e --format=int8     # one of them
    python tools/compile_inference.py --out=experiments/benchmarks/compile_inference.json

One row for each program: "decode 32" draws a token for each of 32 rows, "prefill 512" reads 512 tokens of prompts
beside what the other rows draw. Bytes are of one device: "weights" and "pages" are what it keeps, "temporaries" what a
program needs beside them. "kernels" counts the calls of kernels in the compiled program by their names, "collectives"
the bytes that devices send one another in a step, by kind (the size of the whole array, see `tools/collectives.py`).
What is too large for a chip has the compiler's words in "does_not_fit".

Needs what compiling for those chips needs: libtpu, or jax's CUDA plugin.
"""

import argparse
import collections
import json
import math
import os
import re
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hlo import collectives

# One chip, and eight of them: a topology, and a format of the weights.
CASES = tuple(
  (topology, format)
  for topology in ("v5e", "v5e:2x4", "v6e", "v6e:2x4", "h100", "h100:8")
  for format in ("bfloat16", "int8", "int4")
)
ROWS, TOKENS, LENGTH = 32, 512, 8192  # rows at once, tokens of a step, tokens of a request


def devices_of(topology: str) -> list[jax.Device]:
  """The devices of a slice of TPUs ("v5e:2x4") or of a host of GPUs ("h100:8"), or one chip."""
  from jaxllm.parallel.topologies import GPUS, gpu_mesh, tpu_devices

  chip, _, size = topology.partition(":")
  return list(gpu_mesh(chip, int(size or 1)).devices.flat) if chip in GPUS else tpu_devices(topology)


def weights(config, compute, format: str, mesh):
  """What an engine would keep of a model's weights: shapes, with shardings."""
  from jaxllm.models.build import declare, described, unstack_layers
  from jaxllm.models.quantization import quantize_matrix
  from jaxllm.models.weights import cast, map_weights_with_path

  _, shapes, axes = declare(config, compute)

  def round_(params):
    params = cast(unstack_layers(params), compute.dtype)
    if format in ("bfloat16", "float32"):
      return params
    return map_weights_with_path(lambda path, w: quantize_matrix(path, w, format), params)

  return described(jax.eval_shape(round_, shapes), axes, mesh)


def compile_case(topology: str, format: str, config=None, kernels: str = "pallas"):
  """A row for each program of the case, as they are compiled; `config`: of another model than Llama 3 8B."""
  from jaxllm.base.chips import chip_of
  from jaxllm.inference.engine.programs import Programs
  from jaxllm.inference.engine.sizes import engine_sizes
  from jaxllm.models import presets
  from jaxllm.models.config import ComputeConfig
  from jaxllm.parallel.config import MeshConfig
  from jaxllm.parallel.mesh import make_mesh

  config = config or presets.llama3_8b()
  devices = devices_of(topology)
  mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices)
  chip = chip_of(devices[0].platform, devices[0].device_kind)
  compute = ComputeConfig(dtype="bfloat16", kernels=kernels).on(chip.name, len(devices))
  params = weights(config, compute, format, mesh)
  longest = min(LENGTH, config.max_seq_len)
  held = _bytes(params)
  page = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 * PAGE // len(devices)
  room = max(0.0, 0.9 * chip.memory - held - 1.5 * 2**30)
  sizes = engine_sizes(
    config,
    compute,
    max_num_seqs=ROWS,
    max_model_len=longest,
    num_pages=max(longest // PAGE, min(ROWS * longest // PAGE, int(room / page))),
    page_size=PAGE,
    max_tokens_per_step=TOKENS,
    kv_dtype=None,
    max_logprobs=20,
    processed_logprobs=False,
    max_biases=(64, 8),
    max_drafts=0,
    row_buckets=(1, ROWS),
    token_buckets=(TOKENS,),
  )
  programs = Programs(config, compute, mesh, sizes)
  platform = "tpu" if devices[0].platform == "tpu" else "cuda"
  state = programs.described(platform)
  for key, traced in programs.traced(params, state):
    if key[0] != "step":
      continue
    shape = key[1]
    start = time.monotonic()
    row = {
      "topology": topology,
      "format": format,
      "program": f"decode {shape.rows}" if shape.tokens == 1 else f"prefill {shape.tokens}",
      "weights": held,
      "pages": _bytes(state.layers),
      "memory": chip.memory,
    }
    try:
      compiled = traced.lower(lowering_platforms=(platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      yield row | {"does_not_fit": str(error).splitlines()[0][:200]}
      continue
    memory, text = compiled.memory_analysis(), compiled.as_text()
    yield row | {
      "temporaries": memory.temp_size_in_bytes,
      "kernels": dict(kernel_calls(text)),
      "collectives": _by_kind(text, mesh),
      "seconds": round(time.monotonic() - start),
    }


PAGE = 16  # tokens


def kernel_calls(text: str) -> collections.Counter[str]:
  """How often a compiled program calls each kernel that is not XLA's own, by its name in the program's metadata."""
  found: collections.Counter[str] = collections.Counter()
  for line in text.splitlines():
    target = re.search(r'custom_call_target="([^"]+)"', line)
    if target and re.search(r"tpu_custom_call|mosaic|triton|cudnn|cublas", target[1], re.IGNORECASE):
      name = re.search(r"%([\w-]+?)(?:\.\d+)? = ", line)
      found[name[1] if name else target[1]] += 1
  return found


def _by_kind(text: str, mesh) -> dict[str, int]:
  sent: collections.Counter[str] = collections.Counter()
  for one in collectives(text, mesh):
    sent[one.kind] += one.bytes * one.times
  return dict(sent)


def _bytes(tree) -> int:
  """Of one device."""
  return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--topology", help="only this one")
  parser.add_argument("--format", help="only this one: bfloat16, int8, int4")
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  jax.config.update("jax_enable_compilation_cache", False)
  rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
  done = {(row["topology"], row["format"]) for row in rows}
  for topology, format in CASES:
    if args.topology not in (None, topology) or args.format not in (None, format) or (topology, format) in done:
      continue
    for row in compile_case(topology, format):
      rows.append(row)
      sizes = ("weights", "pages", "temporaries", "memory")
      gib = {name: f"{row[name] / 2**30:.2f}" for name in sizes if name in row}
      rest = [row[name] for name in ("does_not_fit", "kernels", "collectives", "seconds") if name in row]
      print(topology, format, row["program"], gib, *rest, flush=True)
    if args.out:
      args.out.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()

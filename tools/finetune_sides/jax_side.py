"""The jax side of bench_finetune.py: the package's own compiled step. Reads a number of steps, answers with JSON."""

import json
import pathlib
import sys
import time

settings = json.loads(sys.argv[1])

import jax  # noqa: E402
import numpy as np  # noqa: E402
from common import MODULES, Peaks, batches  # noqa: E402

from jaxllm.data.config import DataConfig  # noqa: E402
from jaxllm.interop.open import open_model  # noqa: E402
from jaxllm.kernels import cpu_ffi  # noqa: E402
from jaxllm.models.config import ComputeConfig  # noqa: E402
from jaxllm.objectives.causal_lm import CausalLM  # noqa: E402
from jaxllm.objectives.dpo import DPO  # noqa: E402
from jaxllm.parallel.config import MeshConfig  # noqa: E402
from jaxllm.parallel.mesh import make_mesh  # noqa: E402
from jaxllm.peft.base import Full  # noqa: E402
from jaxllm.peft.lora import Lora  # noqa: E402
from jaxllm.training.compile import make_program  # noqa: E402
from jaxllm.training.config import ModelInitConfig, OptimizerConfig, TrainingConfig  # noqa: E402
from jaxllm.training.start import Start  # noqa: E402

method, P = settings["method"], settings["prompt"]
cpu_ffi.keep_memory_resident()
mesh = make_mesh(MeshConfig(data=1))
peaks = Peaks()
print(json.dumps(f"jax {jax.__version__}"), flush=True)


def built():
  quantized = {}
  if method == "qlora":
    quantized = {"quantize": "nf4"} | ({"double_quantize": True} if settings["double_quantize"] else {})
  init = ModelInitConfig(path=settings["model"], **quantized)
  stored = open_model(init.path)
  start = Start(init, stored)
  optimizer = OptimizerConfig(
    learning_rate=settings["learning_rate"], schedule="constant", warmup_steps=0, b2=0.999, weight_decay=0.0
  )
  program = make_program(
    stored.config,
    TrainingConfig(steps=1000, batch_size=settings["batch"], seq_len=settings["length"]),
    optimizer,
    MeshConfig(data=1),
    mesh,
    DPO() if method == "dpo" else CausalLM(),
    DataConfig(task="preference" if method == "dpo" else "chat", packing="none"),
    ComputeConfig(dtype=settings["dtype"], **settings["compute"]),
    Full() if method == "full" else Lora(rank=settings["rank"], alpha=settings["alpha"]),
    start,
  )
  return program, start


def save_first_factors(params):
  """The A of every adapter as PEFT has it, by PEFT's names, for the other side to begin with."""
  found = {}
  for path, module in MODULES.items():
    w = params
    for name in (*path.split("/"), "weight"):
      w = w[name]
    for i, a in enumerate(np.asarray(w.a)):
      found[f"model.layers.{i}.{module}"] = a.T
  np.savez(settings["adapter"], **found)


def as_batch(rows):
  weights = np.zeros(rows.shape, np.float32)
  weights[:, P - 1 : -1] = 1.0  # by target: the answer's tokens
  return {
    "inputs": rows.astype(np.int32),
    "targets": np.roll(rows, -1, axis=1).astype(np.int32),
    "positions": np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape),
    "segment_ids": np.ones(rows.shape, np.int32),
    "loss_weights": weights,
  }


line = sys.stdin.readline()
program, start = built()
state, frozen = program.init(jax.random.key(0), start.load(program.loaded))
if method != "full" and not pathlib.Path(settings["adapter"]).exists():
  save_first_factors(program.policy(state.params, frozen))
began = time.perf_counter()
step = program.step.lower(*program.arguments).compile()
facts = {"compile_s": time.perf_counter() - began}
analysis = step.memory_analysis()
facts |= {
  "frozen_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(frozen)),
  "trained": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
  "compiled_peak_bytes": analysis.argument_size_in_bytes
  + analysis.output_size_in_bytes
  - analysis.alias_size_in_bytes
  + analysis.temp_size_in_bytes,
}
if method == "dpo":
  data = [{"chosen": as_batch(rows[0]), "rejected": as_batch(rows[1])} for rows in batches(settings)]
else:
  data = [as_batch(rows) for rows in batches(settings)]
done = 0
while line:
  times, losses = [], []
  for _ in range(int(line)):
    batch = data[done % len(data)]
    done += 1
    began = time.perf_counter()
    state, metrics = step(state, frozen, batch)
    losses.append(float(metrics["loss"]))
    jax.block_until_ready(state)
    cpu_ffi.release_memory(beyond=3 * analysis.temp_size_in_bytes // 2)
    times.append(time.perf_counter() - began)
  if not peaks.whole:
    peaks.warmed_up()
  print(json.dumps({"times": times, "losses": losses} | facts | peaks.answer()), flush=True)
  line = sys.stdin.readline()

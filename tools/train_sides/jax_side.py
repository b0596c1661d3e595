"""The jax side of bench_train.py: the package's own compiled step. Reads a number of steps, answers with JSON."""

import json
import pathlib
import sys
import time

settings = json.loads(sys.argv[1])
off = set(settings["without"])

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxllm.kernels import cpu_ffi  # noqa: E402
from jaxllm.models.config import ComputeConfig, ModelConfig  # noqa: E402
from jaxllm.parallel.config import MeshConfig  # noqa: E402
from jaxllm.parallel.mesh import make_mesh  # noqa: E402
from jaxllm.training.compile import make_program  # noqa: E402
from jaxllm.training.config import OptimizerConfig, TrainingConfig  # noqa: E402

B, T, V = settings["batch"], settings["length"], settings["vocab"]
model = ModelConfig(
  vocab_size=V,
  embed_dim=settings["embed"],
  num_layers=settings["layers"],
  num_heads=settings["heads"],
  mlp_dim=settings["mlp"],
  max_seq_len=T,
)
kernels = {op: "xla" for op in ("matmul", "attention", "cross_entropy", "elementwise") if op in off}
training = TrainingConfig(steps=1000, batch_size=B, seq_len=T)
compute = ComputeConfig(dtype=settings["dtype"], unroll_layers=1 if "unroll" in off else None, **kernels)
optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
if "resident" not in off:
  cpu_ffi.keep_memory_resident()
print(json.dumps(f"jax {jax.__version__}"), flush=True)
mesh = make_mesh(MeshConfig(data=1))
program = make_program(model, training, optimizer, MeshConfig(data=1), mesh, compute_config=compute)
state, frozen = program.init(jax.random.key(0), {})
weights = pathlib.Path(settings["weights"])
if not weights.exists():
  flat = jax.tree_util.tree_leaves_with_path(state.params)
  np.savez(weights, **{jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat})
tokens = np.random.default_rng(1).integers(0, V, (64, B, T + 1)).astype(np.int32)
constant = {
  "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
  "segment_ids": np.ones((B, T), np.int32),
  "loss_weights": np.ones((B, T), np.float32),
}
done = 0
for line in sys.stdin:
  times, losses = [], []
  for _ in range(int(line)):
    rows = tokens[done % len(tokens)]
    done += 1
    began = time.perf_counter()
    state, metrics = program.step(state, frozen, {"inputs": rows[:, :-1], "targets": rows[:, 1:]} | constant)
    losses.append(float(metrics["loss"]))
    jax.block_until_ready(state)
    times.append(time.perf_counter() - began)
  print(json.dumps({"times": times, "losses": losses}), flush=True)

"""Losses of a few steps and of an evaluation on some mesh, read from prepared data: in one process or as one of two.

python mesh_losses.py PREPARED.pickle PORT INDEX prints those of the cases of PAIRS for its devices per process.
"""

import json
import pickle
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.models.config import ModelConfig
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.heldout import heldout_metrics
from jaxllm.parallel.batch import local_rows, put_batch
from jaxllm.parallel.config import AXES, MeshConfig
from jaxllm.training.compile import make_program
from jaxllm.training.config import OptimizerConfig, TrainingConfig

MODEL = ModelConfig(vocab_size=272, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=32, max_seq_len=32)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
# By devices per process: the mesh, the order of the devices in it, and the rows that each process reads. Processes
# own devices 0, 1, … in blocks.
PAIRS = {
  1: [
    (dict(data=1, fsdp=2), (1, 0), [(2, 3), (0, 1)]),
    (dict(data=1, tensor=2), (0, 1), [(0, 1, 2, 3)] * 2),
    (dict(data=1, context=2), (0, 1), [(0, 1, 2, 3)] * 2),
  ],
  2: [
    (dict(data=2, tensor=2), (0, 1, 2, 3), [(0, 1), (2, 3)]),
    (dict(data=2, tensor=2), (0, 2, 1, 3), [(0, 1, 2, 3)] * 2),
    (dict(data=4), (0, 2, 1, 3), [(0, 2), (1, 3)]),
  ],
}


def measure(data, sizes, order):
  """(losses of three steps, held-out loss and bits per byte, the rows of each batch that this process read)."""
  mesh_config = MeshConfig(**sizes)
  training = TrainingConfig(steps=3, batch_size=4, seq_len=32)
  grid = np.asarray([jax.devices()[i] for i in order]).reshape([getattr(mesh_config, axis) for axis in AXES])
  mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
  program = make_program(MODEL, training, OPTIMIZER, mesh_config, mesh)
  rows = local_rows(program.batch)
  prepared = open_prepared(data)
  settings = dict(batch_size=training.batch_size, seq_len=training.seq_len, prepared=prepared)
  state, frozen = program.init(jax.random.key(0), {})
  losses = []
  batches = zip(train_batches(data, seed=0, rows=rows, **settings), train_batches(data, seed=0, **settings))
  for _, (batch, whole) in zip(range(training.steps), batches):
    arrays = put_batch(batch, program.batch, rows)
    for name, array in arrays.items():
      for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[name][shard.index])
    state, metrics = program.step(state, frozen, arrays)
    losses.append(float(metrics["loss"]))
  heldout = heldout_batches(data, rows=rows, max_batches=40, **settings)
  evaluate = lambda batch: program.evaluate(state.params, frozen, put_batch(batch, program.batch, rows))  # noqa: E731
  values = heldout_metrics(CausalLM(), evaluate, heldout)
  return losses, [values["eval/loss"], values["eval/bits_per_byte"]], rows


if __name__ == "__main__":
  path, port, index = sys.argv[1:]
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
  with open(path, "rb") as file:
    config = pickle.load(file)
  print(json.dumps([measure(config, sizes, order) for sizes, order, _ in PAIRS[jax.local_device_count()]]))

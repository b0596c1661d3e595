"""Llama 3 8B (arXiv 2407.21783, table 3) at sequence 8192 on a TPU v5p-64 slice or 8 H100s.

Run on every host of the slice: python -m jaxllm.train --config=configs/llama3_8b.py
On 8 H100s: … --config.mesh.fsdp=8 --config.training.batch_size=128 --config.training.accumulation=16
Hardware: 32 TPU v5p chips (a v5p-64 slice) or 8 H100s of 80 GB.
Memory: 8.03 B parameters take 16 bytes of state and gradient each, 128 GB over the fsdp axis.
Kernels, with compute.kernels="auto": on TPU all are XLA's, because none of ours was measured there yet. XLA's
  attention goes block by block, so that its memory grows with the length and not with its square, but writes its scores
  out: try --config.compute.kernels=pallas first. On H100 attention is cuDNN's, with a mask of 128 MiB that keeps
  documents apart; the rest is XLA's. docs/kernels.md says how "auto" chooses.
Time, estimated: 1 B tokens take about 30 minutes on 32 v5p chips at 50 % MFU, with a faster attention than XLA's.
  Not yet run.
"""

from jaxllm.config import default_config, to_config_dict
from jaxllm.models.presets import llama3_8b


def get_config():
  c = default_config()
  c.model = to_config_dict(llama3_8b())

  c.data.dir = "data/fineweb_edu_100bt_llama3"
  c.data.sources = [
    dict(kind="huggingface", path="HuggingFaceFW/fineweb-edu:sample-100BT", name="fineweb_edu"),
  ]
  c.data.tokenizer.path = "llama3/tokenizer.json"  # download it from the hub once
  c.data.heldout_fraction = 0.0005
  c.data.workers = 8

  c.training.steps = 50_000  # 105 B tokens
  c.training.batch_size = 256
  c.training.accumulation = 4
  c.training.seq_len = 8192
  c.compute.dtype = "bfloat16"
  c.compute.remat = "full"
  c.training.eval_every = 1000
  c.training.eval_batches = 20

  c.optimizer.learning_rate = 3e-4
  c.optimizer.warmup_steps = 2000
  c.optimizer.final_lr_fraction = 0.01

  c.mesh.data = 1
  c.mesh.fsdp = -1
  c.checkpoint.every = 500
  c.checkpoint.keep_every = 5000
  return c

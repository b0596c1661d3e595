"""A 1.2 B Llama (the shape of Llama 3.2 1B) at sequence 4096 on one H100.

Run: python -m jaxllm.prepare --config=configs/llama_1b.py
     python -m jaxllm.train --config=configs/llama_1b.py
Hardware: one H100 or H200 of 80 GB or more, bfloat16 compute, float32 master weights and Adam moments.
Memory: 1.24 B parameters take 4 + 8 bytes of state and 4 of gradient each, 20 GB; activations are
  recomputed from the weight matmuls' inputs (remat "full"), and the head's logits are never stored whole.
Kernels, with compute.kernels="auto": attention is cuDNN's, with a mask of 256 MiB that keeps documents apart; the rest
  is XLA's. Our Pallas kernels for H100 and H200, and cuDNN's packed layout, which needs no mask, wait until they are
  measured on the chip. --config.compute.kernels=pallas takes ours (jax 0.11); docs/kernels.md says how "auto" chooses.
Time, estimated: 25 B tokens at 45 % MFU are about 5 days. Not yet run in full.
"""

from jaxllm.config import default_config, to_config_dict
from jaxllm.models.presets import llama_1b


def get_config():
  c = default_config()
  c.model = to_config_dict(llama_1b())
  c.model.max_seq_len = 4096
  c.model.rope_scaling = None  # trained at its own length: nothing to stretch

  c.data.dir = "data/fineweb_edu_100bt_llama3"
  c.data.sources = [
    dict(kind="huggingface", path="HuggingFaceFW/fineweb-edu:sample-100BT", name="fineweb_edu"),
  ]
  c.data.tokenizer.path = "llama3/tokenizer.json"  # download it from the hub once
  c.data.heldout_fraction = 0.0005
  c.data.workers = 8

  c.training.steps = 24_000  # 25 B tokens
  c.training.batch_size = 256
  c.training.accumulation = 32
  c.training.seq_len = 4096
  c.compute.dtype = "bfloat16"
  c.compute.remat = "full"
  c.objective.z_loss = 1e-5
  c.training.eval_every = 1000
  c.training.eval_batches = 20
  c.training.sample_every = 2000

  c.optimizer.learning_rate = 4e-4
  c.optimizer.warmup_steps = 500
  c.optimizer.schedule = "wsd"
  c.checkpoint.every = 500
  return c

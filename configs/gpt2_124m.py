"""GPT-2 124M from scratch on FineWeb-Edu (the small model of Radford et al., 2019).

Run: python -m jaxllm.prepare --config=configs/gpt2_124m.py   (10 GB of text, once)
     python -m jaxllm.train --config=configs/gpt2_124m.py
Hardware: one GPU of 24 GB or more in bfloat16; more GPUs take more data (mesh.data=-1).
Kernels, with compute.kernels="auto": attention is cuDNN's, with a mask of 128 MiB that keeps documents apart; the rest
  is XLA's. Our Pallas kernels for H100 and H200, and cuDNN's packed layout, which needs no mask, wait until they are
  measured on the chip. --config.compute.kernels=pallas takes ours (jax 0.11); docs/kernels.md says how "auto" chooses.
Time, estimated: 10 B tokens at 40 % MFU on one H100 are about 6 hours. Not yet run in full.
Expect: a held-out loss near 3.2 nats per GPT-2 token after 10 B tokens (build-nanogpt's report on FineWeb-Edu).
"""

from jaxllm.config import default_config, to_config_dict
from jaxllm.models.presets import gpt2_124m


def get_config():
  c = default_config()
  c.model = to_config_dict(gpt2_124m())
  c.model.vocab_size = 50304  # 50257 rounded up to a multiple of 128

  c.data.dir = "data/fineweb_edu_10bt"
  c.data.sources = [
    dict(kind="huggingface", path="HuggingFaceFW/fineweb-edu:sample-10BT", name="fineweb_edu"),
  ]
  c.data.tokenizer.path = "gpt2/tokenizer.json"  # download it from the hub once
  c.data.heldout_fraction = 0.001
  c.data.workers = 4

  c.training.steps = 19_073  # 10 B tokens
  c.training.batch_size = 512
  c.training.accumulation = 8
  c.training.seq_len = 1024
  c.compute.dtype = "bfloat16"
  c.training.eval_every = 1000
  c.training.eval_batches = 20
  c.training.sample_every = 1000

  c.optimizer.learning_rate = 6e-4
  c.optimizer.warmup_steps = 715
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay = 0.1
  c.checkpoint.every = 1000
  return c


def sweep(add):
  for learning_rate in (3e-4, 6e-4, 1.2e-3):
    add(**{"optimizer.learning_rate": learning_rate, "training.steps": 2000})

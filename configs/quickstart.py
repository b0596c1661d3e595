"""A small Llama on the sources of Python's standard library.

Run: make quickstart
     or: python -m jaxllm.prepare --config=configs/quickstart.py
         python -m jaxllm.train --config=configs/quickstart.py
Hardware: 2 CPU cores; the model is sized so that a few minutes there buy the best held-out result.
Time: about five minutes with preparation and baselines; a CPU that multiplies bfloat16 (AMX) takes more steps in it.
Expect: with AMX 1.13 bits per byte on held-out files, else 1.25, where gzip -9 makes 1.76 and xz -9e 1.54 of the same.
"""

from jaxllm.config import default_config
from jaxllm.data.sources import stdlib_sources
from jaxllm.kernels.backends import has_bfloat16


def get_config():
  c = default_config()
  c.data.dir = "data/quickstart"
  c.data.sources = [stdlib_sources()]
  c.data.tokenizer.vocab_size = 2048

  c.model.vocab_size = 2048
  c.model.embed_dim = 128
  c.model.num_layers = 4
  c.model.num_heads = 2
  c.model.max_seq_len = 256

  c.compute.dtype = "auto"
  c.training.steps = 3500 if has_bfloat16("cpu") else 1500
  c.training.batch_size = 8
  c.training.seq_len = 256
  c.training.eval_every = 500
  c.training.sample_every = 500
  c.training.sample_prompts = ("import ", "def ", "class ")
  c.training.sample_tokens = 160
  c.training.sample_temperature = 0.7

  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 3e-3  # of embeddings and norms; the matrices take muon_learning_rate
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 30
  c.optimizer.decay_fraction = 0.4
  c.optimizer.final_lr_fraction = 0.0
  c.checkpoint.every = 500
  return c


def sweep(add):
  for muon_learning_rate in (0.01, 0.02, 0.04):
    add(**{"optimizer.muon_learning_rate": muon_learning_rate, "training.steps": 200})

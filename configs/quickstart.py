"""A small Llama on the sources of Python's standard library, on a laptop CPU.

Run: make quickstart
     or: python -m jaxllm.prepare --config=configs/quickstart.py
         python -m jaxllm.train --config=configs/quickstart.py
"""

from jaxllm.config import default_config
from jaxllm.data.sources import stdlib_sources


def get_config():
  c = default_config()
  c.data.dir = "data/quickstart"
  c.data.sources = [stdlib_sources()]
  c.data.tokenizer.vocab_size = 4096

  c.model.vocab_size = 4096
  c.model.embed_dim = 256
  c.model.num_layers = 4
  c.model.num_heads = 4
  c.model.max_seq_len = 256

  c.training.steps = 1000
  c.training.batch_size = 16
  c.training.seq_len = 256
  c.training.sample_prompts = ("import ", "def ", "class ")
  c.training.sample_every = 250

  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 3e-3
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 50
  c.checkpoint.every = 250
  return c


def sweep(add):
  for learning_rate in (1e-3, 3e-3):
    add(**{"optimizer.learning_rate": learning_rate, "training.steps": 200})

"""Which package of the standard library is a function from? An encoder with a classification head.

Run: python -m jaxllm.prepare --config=configs/classify_tiny.py
     python -m jaxllm.train --config=configs/classify_tiny.py
Hardware: 2 CPU cores.
Time: half a minute, preparation included.
Expect: held-out, 82 % of the functions right, macro F1 0.78; the most frequent package is a quarter of them.

Texts of one's own: `c.data.sources = [dict(kind="jsonl", path="reviews.jsonl", fields=("text", "label"))]`, with
`c.data.labels` the labels' names; three fields are two texts and a label.
"""

import sysconfig

from jaxllm.config import default_config

PACKAGES = ("asyncio", "email", "idlelib", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")


def get_config():
  c = default_config()
  root = sysconfig.get_paths()["stdlib"]
  c.data.dir = "data/classify_tiny"
  path = ",".join(f"{root}/{package}/**/*.py" for package in PACKAGES)
  c.data.sources = [dict(kind="python", path=path, name="functions", fields=("code", "package"))]
  c.data.tokenizer.vocab_size = 1024
  c.data.heldout_fraction = 0.1
  c.data.task = "classification"
  c.data.packing = "none"
  c.data.labels = PACKAGES
  c.objective.name = "classification"

  c.model.architecture = "encoder"
  c.model.head = "sequence"
  c.model.num_labels = len(PACKAGES)
  c.model.pooling = "mean"
  c.model.vocab_size = 1024
  c.model.embed_dim = 64
  c.model.num_layers = 2
  c.model.num_heads = 2
  c.model.max_seq_len = 128

  c.training.steps = 400
  c.training.batch_size = 16
  c.training.seq_len = 128
  c.training.eval_every = 100

  c.optimizer.learning_rate = 3e-3
  c.optimizer.warmup_steps = 30
  c.checkpoint.every = 100
  return c

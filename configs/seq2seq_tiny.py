"""From a docstring to the function's name: sequence to sequence, on the standard library's documented functions.

Run: python -m jaxllm.prepare --config=configs/seq2seq_tiny.py
     python -m jaxllm.train --config=configs/seq2seq_tiny.py
Hardware: 2 CPU cores.
Time: 1 min 50 s beside other jobs, and half a minute for preparation.
Expect: held-out, 52 % of the names' tokens right, given those before, at 2.22 nats each.

Pairs of one's own: `c.data.sources = [dict(kind="jsonl", path="pairs/*.jsonl", fields=("source", "target"))]`.
"""

from jaxllm.config import default_config
from jaxllm.data.sources import stdlib_functions


def get_config():
  c = default_config()
  c.data.dir = "data/seq2seq_tiny"
  c.data.sources = [stdlib_functions("docstring", "name")]
  c.data.tokenizer.vocab_size = 1024
  c.data.heldout_fraction = 0.05
  c.data.task = "pairs"
  c.data.packing = "best_fit"
  c.data.target_len = 48
  c.objective.name = "seq2seq"

  c.model.architecture = "encoder_decoder"
  c.model.vocab_size = 1024
  c.model.embed_dim = 128
  c.model.num_layers = 2
  c.model.num_heads = 2
  c.model.max_seq_len = 192

  c.training.steps = 600
  c.training.batch_size = 16
  c.training.seq_len = 192
  c.training.eval_every = 200

  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 3e-3  # of embeddings and norms; the matrices take muon_learning_rate
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 30
  c.optimizer.decay_fraction = 0.4
  c.optimizer.final_lr_fraction = 0.0
  c.checkpoint.every = 200
  return c

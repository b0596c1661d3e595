"""A small BERT on the sources of Python's standard library: masked language modelling with whole words.

Run: python -m jaxllm.prepare --config=configs/bert_mlm_tiny.py
     python -m jaxllm.train --config=configs/bert_mlm_tiny.py
Hardware: 2 CPU cores.
Time: 2 to 3 minutes at the 16,000 tokens/s that were seen there; the whole run took 6 min 30 s beside other jobs.
Expect: held-out, 29 % of the masked tokens right, at 4.18 nats each. Whole words of code, often with their
  brackets and dots, are hard to guess; with data.corruption.whole_words False the figures are of single pieces.
"""

from jaxllm.config import default_config
from jaxllm.data.sources import stdlib_sources


def get_config():
  c = default_config()
  c.data.dir = "data/bert_mlm_tiny"
  c.data.sources = [stdlib_sources()]
  c.data.tokenizer.vocab_size = 2048
  c.data.packing = "best_fit"  # documents that fit stay whole, and never see each other
  c.data.task = "masking"
  c.data.corruption.mask_id = 2048  # the tokenizer trained here has no mask token: one id past its vocabulary
  c.objective.name = "masked_lm"

  c.model.architecture = "encoder"
  c.model.vocab_size = 2112  # 2048 and the mask, rounded up to a multiple of 64
  c.model.embed_dim = 128
  c.model.num_layers = 4
  c.model.num_heads = 2
  c.model.max_seq_len = 128
  c.model.head_dense = "gelu"
  c.model.head_norm = True

  c.training.steps = 800
  c.training.batch_size = 16
  c.training.seq_len = 128
  c.training.eval_every = 400
  c.training.eval_batches = 40

  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 3e-3  # of embeddings and norms; the matrices take muon_learning_rate
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 30
  c.optimizer.decay_fraction = 0.4
  c.optimizer.final_lr_fraction = 0.0
  c.checkpoint.every = 400
  return c

"""A small T5 on the sources of Python's standard library: span corruption, an encoder and a decoder.

Run: python -m jaxllm.prepare --config=configs/t5_span_tiny.py
     python -m jaxllm.train --config=configs/t5_span_tiny.py
Hardware: 2 CPU cores.
Time, estimated: 2 to 3 minutes; it took 5 min 40 s beside six other jobs.
Expect: held-out, 32 % of the target tokens right (sentinels, which are known beforehand, among them), at 3.87 nats.
"""

from jaxllm.config import default_config
from jaxllm.data.sources import stdlib_sources


def get_config():
  c = default_config()
  c.data.dir = "data/t5_span_tiny"
  c.data.sources = [stdlib_sources()]
  c.data.tokenizer.vocab_size = 2048
  c.data.packing = "best_fit"
  c.data.task = "span_corruption"
  c.data.corruption.rate = 0.15
  c.data.corruption.mean_span = 3.0
  c.data.corruption.sentinel_id = 2111  # sentinels count down from the end of the model's vocabulary, past the
  c.objective.name = "seq2seq"  # tokenizer's, which has none

  c.model.architecture = "encoder_decoder"
  c.model.vocab_size = 2112
  c.model.embed_dim = 128
  c.model.num_layers = 2
  c.model.num_heads = 2
  c.model.max_seq_len = 128
  c.model.position = "relative"

  c.training.steps = 1000
  c.training.batch_size = 16
  c.training.seq_len = 128  # the encoder's; the decoder's 29 follow from rate and mean_span
  c.training.eval_every = 500
  c.training.eval_batches = 40

  c.optimizer.name = "muon"
  c.optimizer.learning_rate = 3e-3  # of embeddings and norms; the matrices take muon_learning_rate
  c.optimizer.schedule = "wsd"
  c.optimizer.warmup_steps = 30
  c.optimizer.decay_fraction = 0.4
  c.optimizer.final_lr_fraction = 0.0
  c.checkpoint.every = 500
  return c

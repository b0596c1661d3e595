"""Tokens per second of the data pipeline, by packing and workers, on the standard library's sources.

python tools/bench_data.py [--dir=DIR] [--seq_len=1024] [--batch_size=32] [--seconds=3]
"""

import argparse
import dataclasses
import time

from jaxllm.data.config import DataConfig
from jaxllm.data.pipeline import train_batches
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import stdlib_sources


def measure(config: DataConfig, seq_len: int, batch_size: int, seconds: float) -> tuple[float, float, float]:
  """Seconds to the first batch, then tokens that carry loss per second and their share of all positions."""
  started = time.monotonic()
  iterator = train_batches(config, batch_size=batch_size, seq_len=seq_len, seed=0)
  next(iterator)
  first = time.monotonic() - started
  started, tokens, positions = time.monotonic(), 0.0, 0
  while time.monotonic() < started + seconds:
    weights = next(iterator)["loss_weights"]
    tokens += float(weights.sum())
    positions += weights.size
  elapsed = time.monotonic() - started
  iterator.close()
  return first, tokens / elapsed, tokens / positions


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--dir", default="data/stdlib")
  parser.add_argument("--seq_len", type=int, default=1024)
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--seconds", type=float, default=3.0)
  args = parser.parse_args()
  base = DataConfig(dir=args.dir, sources=(stdlib_sources(),))
  info = prepare(base)
  print(f"prepared in {info.seconds:.1f} s: {info.prepared.total('train', 'tokens'):,} tokens")
  print(f"{'packing':<11}{'workers':>8}{'first batch s':>15}{'tokens/s':>13}{'filled':>9}")
  for packing in ("split", "first_fit", "best_fit", "none"):
    for workers in (0, 1, 2):
      config = dataclasses.replace(base, packing=packing, workers=workers)
      first, rate, filled = measure(config, args.seq_len, args.batch_size, args.seconds)
      print(f"{packing:<11}{workers:>8}{first:>15.2f}{rate:>13,.0f}{filled:>9.1%}")


if __name__ == "__main__":
  main()

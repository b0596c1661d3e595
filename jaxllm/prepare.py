"""Turn a corpus into what training reads: a tokenizer and tokenized shards.

  python -m jaxllm.prepare --config=configs/quickstart.py

Uses the config's `data` group and fills `data.dir`; running it again does nothing unless the corpus or the
settings changed.
"""

import sys
from collections.abc import Sequence

from jaxllm.cli import config_parser, parse_config_args, run_door
from jaxllm.config import load_config
from jaxllm.data.config import DataConfig


def main(argv: Sequence[str]) -> int:
  """Parses the command line and prepares; see the module's text."""
  args, overrides = parse_config_args(config_parser("prepare", __doc__, workdir=False), argv)
  run = load_config(args.config, overrides)
  if run.model_init.path:
    from jaxllm.training.start import with_tokenizer

    run = with_tokenizer(run)
  return prepare_and_report(run.data, run.training.seq_len)


def prepare_and_report(data: DataConfig, seq_len: int = 0) -> int:
  """Prepares `data.dir` and prints what is there, and what rows of `seq_len` hold; returns the exit code."""
  from jaxllm.data.prepare import prepare
  from jaxllm.data.show import example_rows

  info = prepare(data)
  prepared = info.prepared
  print(f"{'source':<24}{'split':<9}{'documents':>10}{'bytes':>14}{'tokens':>13}{'bytes/token':>13}{'shards':>8}")
  for source in prepared.sources:
    for split in ("train", "heldout"):
      part = getattr(source, split)
      ratio = f"{part.bytes / part.tokens:.2f}" if part.tokens else "-"
      print(
        f"{source.name:<24}{split:<9}{part.documents:>10,}{part.bytes:>14,}{part.tokens:>13,}{ratio:>13}"
        f"{part.shards:>8}"
      )
    if source.empty_documents:
      print(f"{source.empty_documents:,} empty documents of {source.name} left out")
    if source.skipped_rows:
      print(f"{source.skipped_rows:,} bad rows of {source.name} skipped, see {prepared.skipped_path}")
    if source.train.trained:
      share = source.train.trained / source.train.tokens
      print(f"{source.train.trained:,} trained tokens in {source.name}, {share:.1%} of its training tokens")
  for name, value in example_rows(data, prepared, seq_len) if seq_len else ():
    print(f"{name}: {value}")
  print(f"tokenizer: {prepared.vocab_size:,} pieces in {prepared.tokenizer_dir}")
  print(f"{'already prepared' if info.already else 'prepared'}: {prepared.root} in {info.seconds:.1f} s")
  return 0


if __name__ == "__main__":
  sys.exit(run_door(main))

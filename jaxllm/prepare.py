"""Turn a corpus into what training reads: a tokenizer and tokenized shards.

  python -m jaxllm.prepare --config=configs/quickstart.py

Uses the config's `data` group and fills `data.dir`; running it again does nothing unless the corpus or the
settings changed, and goes on where a run was stopped. On several hosts that share the directory, run the same command
on each with --host=i/n (jobs of SLURM, Open MPI and Kubernetes are recognised): docs/preparing_data.md.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence

from jaxllm.base.errors import ConfigError
from jaxllm.cli import config_parser, parse_config_args, run_door
from jaxllm.config import load_config
from jaxllm.data.config import DataConfig


def main(argv: Sequence[str]) -> int:
  """Parses the command line and prepares; see the module's text."""
  parser = config_parser("prepare", __doc__, workdir=False)
  parser.add_argument("--processes", type=_processes, metavar="N", help="of this machine (default: one a core)")
  parser.add_argument("--host", type=_host, metavar="I/N", help="this is host I (from 0) of N that share the work")
  args, overrides = parse_config_args(parser, argv)
  run = load_config(args.config, overrides)
  if run.model_init.path:
    from jaxllm.training.start import with_tokenizer

    run = with_tokenizer(run)
  _, hosts = args.host or _host_of_job(os.environ)
  return prepare_and_report(run.data, run.training.seq_len, args.processes, shared=hosts > 1)


def _processes(text: str) -> int:
  if not text.isdecimal() or not 1 <= int(text) <= 4096:
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes, from 1 on")
  return int(text)


def _host(text: str) -> tuple[int, int]:
  """A host's number and how many there are, of "0/4"."""
  found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
  if not found or not int(found[1]) < int(found[2]):
    raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
  return int(found[1]), int(found[2])


def _host_of_job(variables: Mapping[str, str]) -> tuple[int, int]:
  """What a job's variables say of it; one host where they say nothing."""
  for index, count in (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
  ):
    if variables.get(index) and variables.get(count):
      try:
        return _host(f"{variables[index]}/{variables[count]}")
      except argparse.ArgumentTypeError as error:
        raise ConfigError(
          f"the variables {index}={variables[index]!r} and {count}={variables[count]!r} name no host of a job; "
          "unset them, or say --host=I/N"
        ) from error
  return 0, 1


def prepare_and_report(data: DataConfig, seq_len: int = 0, processes: int | None = None, shared: bool = False) -> int:
  """Prepares `data.dir` and prints what is there, and what rows of `seq_len` hold; returns the exit code.

  Args:
    processes, shared: as `jaxllm.data.prepare.prepare` has them.
  """
  from jaxllm.data.prepare import prepare
  from jaxllm.data.show import example_rows

  info = prepare(data, processes=processes, shared=shared)
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
    if source.null_rows:
      print(f"{source.null_rows:,} rows of {source.name} without the field left out")
    if source.train.trained:
      share = source.train.trained / source.train.tokens
      print(f"{source.train.trained:,} trained tokens in {source.name}, {share:.1%} of its training tokens")
  if prepared.duplicates:
    print(f"{prepared.duplicates:,} documents repeat another word for word")
  for name, value in example_rows(data, prepared, seq_len) if seq_len else ():
    print(f"{name}: {value}")
  print(f"tokenizer: {prepared.vocab_size:,} pieces in {prepared.tokenizer_dir}")
  print(f"{'already prepared' if info.already else 'prepared'}: {prepared.root} in {info.seconds:.1f} s")
  return 0


if __name__ == "__main__":
  sys.exit(run_door(main))

"""Train a language model from a config file.

  python -m jaxllm.train --config=configs/quickstart.py
  python -m jaxllm.train --config=configs/quickstart.py --workdir=runs/small --config.model.num_layers=2
  python -m jaxllm.train --config=configs/quickstart.py --sweep

The run directory gets config.json, metrics.jsonl, checkpoints/, samples/ and tensorboard/. Starting the same
command again resumes from the last checkpoint; Ctrl-C saves one first. `training.steps` may grow.
"""

import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.base import stopping
from jaxllm.base.errors import one_line
from jaxllm.cli import config_parser, explain_error, parse_config_args, print_config, run_door
from jaxllm.config import load_config, sweep_points

if TYPE_CHECKING:
  from jaxllm.training.config import RunConfig


def main(argv: Sequence[str]) -> int:
  """Parses the command line and trains; see the module's text."""
  parser = config_parser("train", __doc__)
  parser.add_argument("--sweep", action="store_true", help="run every point of the config's sweep(add)")
  parser.add_argument("--print-config", action="store_true", help="print every key with its value, and exit")
  parser.add_argument("--show-batch", action="store_true", help="print a row of the first batch, decoded, and exit")
  args, overrides = parse_config_args(parser, argv)
  workdir = args.workdir or Path("runs") / Path(args.config).stem
  if args.print_config:
    print_config(load_config(args.config, overrides))
    return 0
  if args.sweep:
    return _sweep(args.config, overrides, workdir)
  run = load_config(args.config, overrides)
  if args.show_batch:
    return _show_batch(run, workdir)

  import jax  # after what can fail without it

  from jaxllm.objectives.heldout import describe
  from jaxllm.parallel.hosts import join_hosts
  from jaxllm.training.loop import train

  join_hosts()
  result = train(run, workdir)
  if jax.process_index() > 0:
    return 0
  command = f"python -m jaxllm.train {' '.join(argv)}"
  if result["stopped"]:
    print(f"stopped at step {result['step']}, which is saved; to go on: {command}")
  else:
    score = describe(result)
    heldout = f", {score}" if score else ""
    print(f"done: step {result['step']}{heldout}, in {workdir}")
  return 0


def _show_batch(run: "RunConfig", workdir: Path) -> int:
  """Prints the first row of the first batch, what is trained in colour."""
  from jaxllm.data.manifest import open_prepared
  from jaxllm.data.pipeline import train_batches
  from jaxllm.data.show import first_row
  from jaxllm.training.start import open_start

  run, _ = open_start(run, workdir)
  training, prepared = run.training, open_prepared(run.data)
  batches = train_batches(
    run.data,
    batch_size=training.batch_size,
    seq_len=training.seq_len,
    seed=training.seed,
    rows=[0],
    prepared=prepared,
    decoder_start_id=run.model.decoder_start_id,
  )
  print(first_row(prepared.tokenizer(), next(batches), colour=sys.stdout.isatty()))
  batches.close()
  return 0


def _sweep(path: str, overrides: Sequence[tuple[str, Any]], workdir: Path) -> int:
  """One run directory per point; a point that fails is reported and the others still run."""
  import jax

  from jaxllm.parallel.hosts import join_hosts
  from jaxllm.training.loop import TrainingStopped, train

  join_hosts()
  say = print if jax.process_index() == 0 else lambda *_, **__: None
  points = sweep_points(path)
  runs = [load_config(path, [*overrides, *point.items()]) for point in points]  # all mistakes before any run
  rows: list[tuple] = []
  failed: list[str] = []
  for number, (point, run) in enumerate(zip(points, runs)):
    label = ",".join(f"{key.split('.')[-1]}={value}" for key, value in point.items())
    directory = workdir / f"{number:02d}-{label}".replace("/", "_").replace(" ", "")
    say(f"== {number + 1} of {len(points)}: {label} -> {directory}", flush=True)
    try:
      result = train(run, directory)
    except Exception as error:
      line = None if stopping.interrupted else explain_error(error)
      if line is None or jax.process_count() > 1 and not isinstance(error, TrainingStopped):
        raise  # a bug of ours; or it may be this host's alone, and the others cannot know
      failed.append(label)
      say(f"error: {line}", file=sys.stderr)
      rows.append((label, f"failed: {one_line(line, 60)}", "", "", directory))
      error.__traceback__ = None  # it holds the arrays of the point that failed
      del error
      continue
    finally:
      gc.collect()
    scores = [f"{result.get(key, float('nan')):.4f}" for key in ("loss", "eval/loss", "eval/bits_per_byte")]
    rows.append((label, *scores, directory))
    if result["stopped"]:
      break
  header = ("point", "loss", "eval/loss", "eval/bits_per_byte", "run directory")
  table = [header, *[tuple(map(str, row)) for row in rows]]
  widths = [max(len(row[i]) for row in table) for i in range(len(header))]
  for row in table:
    say("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
  if failed:
    say(f"error: {len(failed)} of {len(points)} points failed: {', '.join(failed)}", file=sys.stderr)
  return 2 if failed else 0


if __name__ == "__main__":
  sys.exit(run_door(main))

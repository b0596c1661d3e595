"""Measure a model on the held-out text of its corpus, beside what compressors make of the same bytes, or on tasks
whose answers a program checks.

python -m jaxllm.evaluate --model=runs/quickstart --baselines
python -m jaxllm.evaluate --model=PATH --data=data/quickstart
python -m jaxllm.evaluate --model=PATH --adapter=DIR --tasks=chain_sum,gcd --count=100 --samples=4 --temperature=0.7
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.cli import add_model, door_parser, path_argument, run_door

if TYPE_CHECKING:
  from jaxllm.data.manifest import Prepared
  from jaxllm.data.tokenizers import Tokenizer

_COUNTED_BYTES = 128_000_000  # of training text that the n-gram model counts, spread over all of it


def main(argv: Sequence[str]) -> int:
  """Parses the command line and prints the table; see the module's text."""
  parser = door_parser("evaluate", __doc__)
  add_model(parser)
  parser.add_argument(
    "--data", type=path_argument, metavar="DIR", help="prepared data (default: what the run was trained on)"
  )
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--seq-len", type=int, help="tokens of context (default: the training's, or the model's)")
  parser.add_argument("--baselines", action="store_true", help="also gzip, xz and a byte n-gram model")
  parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
  parser.add_argument("--tasks", help="names of reasoning-gym's tasks, with commas between")
  parser.add_argument("--count", type=int, default=100, help="questions of each task")
  parser.add_argument("--seed", type=int, default=0, help="of the questions, and of what is sampled")
  parser.add_argument("--samples", type=int, default=1, help="answers to each question")
  parser.add_argument("--temperature", type=float, default=0.0)
  parser.add_argument("--max-tokens", type=int, default=128, help="of an answer")
  args = parser.parse_args(argv)
  if args.tasks is not None:
    return _verify(args)

  from jaxllm.data.config import DataConfig
  from jaxllm.data.heldout import heldout_batches
  from jaxllm.data.manifest import open_any
  from jaxllm.evaluation.baselines import ByteNGram, gzip_bits_per_byte, xz_bits_per_byte
  from jaxllm.inference.load import read_weights
  from jaxllm.interop.open import open_model
  from jaxllm.objectives.causal_lm import CausalLM
  from jaxllm.objectives.heldout import heldout_metrics

  stored = open_model(args.model, adapter=args.adapter, step=args.step)
  objective = stored.run.get("objective", {}).get("name", "causal_lm")
  if objective != "causal_lm":
    raise ConfigError(
      f"{args.model} was trained with the objective {objective!r}; bits per byte is of models that predict "
      "the next token (held-out metrics of other objectives are in its metrics.jsonl)"
    )
  if stored.config.architecture != "decoder" or stored.config.head != "lm":
    raise ConfigError(
      f"{args.model} does not predict the next token (its model.architecture is {stored.config.architecture!r}, its "
      f"model.head {stored.config.head!r}); bits per byte is of models that do"
    )
  data = args.data or stored.run.get("data", {}).get("dir")
  if not data:
    raise ConfigError(f"{args.model} does not say what it was trained on; name prepared data with --data=DIR")
  prepared = open_any(data)
  if not reads_alike(stored.tokenizer, prepared):
    raise DataError(f"{data} was prepared with another tokenizer than the model's; its token ids mean other text")
  seq_len = args.seq_len or stored.run.get("training", {}).get("seq_len") or stored.config.max_seq_len
  if seq_len > stored.config.max_seq_len:
    raise ConfigError(f"--seq-len {seq_len} is over the model's limit of {stored.config.max_seq_len}")
  model = read_weights(stored)
  heldout = heldout_batches(DataConfig(), prepared=prepared, batch_size=args.batch_size, seq_len=seq_len)
  metrics = heldout_metrics(CausalLM(), lambda batch: {"nll": model.loss_sums(batch)}, heldout)

  rows = {"this model": metrics["eval/bits_per_byte"]}
  if args.baselines:
    rows["gzip -9"] = gzip_bits_per_byte(prepared.heldout_texts())
    rows["xz -9e"] = xz_bits_per_byte(prepared.heldout_texts())
    counted = ByteNGram(order=5).fit(prepared.train_text(_COUNTED_BYTES))
    rows["byte 6-gram"] = counted.bits_per_byte(prepared.heldout_texts())
  if args.json:
    print(json.dumps(metrics | {f"baselines/{name}": value for name, value in list(rows.items())[1:]}))
    return 0
  print(
    f"held-out text: {prepared.total('heldout', 'documents'):,} documents, {heldout.bytes:,.0f} bytes, "
    f"{heldout.tokens:,} tokens; loss {metrics['eval/loss']:.4f} nats per token"
  )
  print(f"{'':14}bits per byte")
  for name, value in sorted(rows.items(), key=lambda row: row[1]):
    print(f"{name:14}{value:.4f}")
  return 0


def _verify(args: argparse.Namespace) -> int:
  """Asks the tasks' questions and prints the accuracy of each task and of all."""
  if args.count < 1 or args.samples < 1:
    raise ConfigError(f"--count {args.count} and --samples {args.samples} must be at least 1")
  if args.samples > 1 and not args.temperature:
    raise ConfigError("--samples without a --temperature would give the same answer each time")
  from jaxllm.evaluation.verified import accuracy, questions_of, scores_of
  from jaxllm.inference.load import load_model

  questions = questions_of(args.tasks.split(","), args.count, args.seed)
  model = load_model(args.model, adapter=args.adapter, step=args.step)
  settings = {"temperature": args.temperature, "max_tokens": args.max_tokens, "seed": args.seed}
  scores = scores_of(model, questions, samples=args.samples, batch_size=args.batch_size, **settings)
  names = dict.fromkeys(question.task for question in questions)
  parts = {name: [i for i, question in enumerate(questions) if question.task == name] for name in names}
  if len(parts) > 1:
    parts["all"] = list(range(len(questions)))
  found = {name: accuracy(scores[rows]) for name, rows in parts.items()}
  if args.json:
    print(json.dumps({name: dataclasses.asdict(one) for name, one in found.items()}))
    return 0
  print(f"{args.count} questions of each task, {args.samples} answer(s) to each")
  print(f"{'task':24}{'accuracy':>9}  {'95% interval':16}{'solved':>7}")
  for name, one in found.items():
    print(f"{name:24}{one.mean:9.3f}  {one.low:.3f} to {one.high:.3f}  {one.solved:7.3f}")
  return 0


def reads_alike(tokenizer: "Tokenizer | None", prepared: "Prepared") -> bool:
  """Whether a tokenizer gives the held-out text the ids that it was prepared with.

  One that went through a GGUF or Hugging Face file has another fingerprint, and may still do so.
  """
  if tokenizer is None:
    return False
  if tokenizer.fingerprint == prepared.tokenizer_fingerprint:
    return True
  if tokenizer.eos_id != prepared.eos_id or tokenizer.start_id != prepared.start_id:
    return False
  texts = prepared.heldout_texts()
  for source in prepared.sources:
    documents = prepared.documents(source, "heldout")
    for index in range(len(documents)):
      if tokenizer.encode(next(texts)).tolist() != documents.record(index).tokens.tolist():
        return False
  return True


if __name__ == "__main__":
  sys.exit(run_door(main))

"""Measure a model on the held-out text of its corpus, beside what compressors make of the same bytes.

python -m jaxllm.evaluate --model=runs/quickstart --baselines
python -m jaxllm.evaluate --model=PATH --data=data/quickstart
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxllm.base.files import local_path
from jaxllm.cli import MODEL_FORMS, run_door
from jaxllm.errors import ConfigError, DataError


def main(argv: Sequence[str]) -> int:
  """Parses the command line and prints the table; see the module's text."""
  parser = argparse.ArgumentParser(
    prog="python -m jaxllm.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--model",
    required=True,
    metavar="PATH",
    help=MODEL_FORMS,
  )
  parser.add_argument("--step", type=int, help="of a run: this checkpoint, not the latest")
  parser.add_argument(
    "--data", type=local_path, metavar="DIR", help="prepared data (default: what the run was trained on)"
  )
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--seq-len", type=int, help="tokens of context (default: the training's, or the model's)")
  parser.add_argument("--baselines", action="store_true", help="also gzip, xz and a byte n-gram model")
  parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
  parser.add_argument("--debug", action="store_true", help="show a traceback where an error is reported")
  args = parser.parse_args(argv)

  from jaxllm.data.heldout import HeldoutBatches
  from jaxllm.data.manifest import read_manifest
  from jaxllm.evaluation.baselines import ByteNGram, gzip_bits_per_byte, xz_bits_per_byte
  from jaxllm.evaluation.bits_per_byte import heldout_metrics
  from jaxllm.inference.load import load_model

  model = load_model(args.model, step=args.step)
  saved = json.loads((Path(args.model) / "config.json").read_text())
  data = args.data or saved.get("data", {}).get("dir")
  if not data:
    raise ConfigError(f"{args.model} does not say what it was trained on; name prepared data with --data=DIR")
  prepared = read_manifest(data)
  if prepared is None:
    raise DataError(f"nothing is prepared in {data}; run python -m jaxllm.prepare first")
  if model.tokenizer is None or model.tokenizer.fingerprint != prepared.tokenizer().fingerprint:
    raise DataError(f"{data} was prepared with another tokenizer than the model's; its token ids mean other text")
  objective = saved.get("objective", {}).get("name", "causal_lm")
  if objective != "causal_lm" or model.config.architecture != "decoder":
    raise ConfigError(
      f"{args.model} was trained with the objective {objective!r}; bits per byte is of models that predict the next "
      "token (held-out metrics of other objectives are in its metrics.jsonl)"
    )
  seq_len = args.seq_len or saved.get("training", {}).get("seq_len") or model.config.max_seq_len
  if seq_len > model.config.max_seq_len:
    raise ConfigError(f"--seq-len {seq_len} is over the model's limit of {model.config.max_seq_len}")
  heldout = HeldoutBatches(prepared, batch_size=args.batch_size, seq_len=seq_len)
  metrics = heldout_metrics(lambda batch: {"nll": model.loss_sums(batch)}, heldout, heldout.bytes)

  rows = {"this model": metrics["eval/bits_per_byte"]}
  if args.baselines:
    text = prepared.heldout_path.read_bytes()
    rows["gzip -9"] = gzip_bits_per_byte(text)
    rows["xz -9e"] = xz_bits_per_byte(text)
    rows["byte 6-gram"] = ByteNGram(order=5).fit(prepared.train_text()).bits_per_byte(text)
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


if __name__ == "__main__":
  sys.exit(run_door(main))

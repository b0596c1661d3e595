"""Turns a model of one form into another: `python -m jaxllm.convert --from=PATH --to=PATH --format=hf`."""

import argparse
import math
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxllm.base.errors import ConfigError
from jaxllm.cli import MODEL_FORMS, add_model, door_parser, path_argument, run_door

if TYPE_CHECKING:
  from jaxllm.interop.stored import StoredModel

EXAMPLES = """
examples:
  python -m jaxllm.convert --from=runs/quickstart --to=my-model --format=hf
  python -m jaxllm.convert --from=runs/quickstart --step=1000 --to=my-model.gguf --format=gguf --quantize=q8_0
  python -m jaxllm.convert --from=downloads/Qwen3-0.6B --to=qwen --format=jaxllm --dtype=bfloat16
  python -m jaxllm.convert --from=downloads/Qwen3-0.6B --adapter=runs/sft/adapter --merge --to=merged

Weights are read and written a tensor at a time. What is written appears under its name when it is complete.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line's settings."""
  parser = door_parser("convert", f"Converts {MODEL_FORMS} into another form.", EXAMPLES)
  add_model(parser, "--from", dest="source")
  add = parser.add_argument
  add("--to", required=True, type=path_argument, metavar="PATH", help="a new or empty directory, or a new .gguf file")
  add("--format", choices=("jaxllm", "hf", "gguf"), help="the form to write (with --merge by default hf)")
  add("--merge", action="store_true", help="compare the logits with those of the adapters apart before writing")
  add(
    "--max-difference",
    type=float,
    metavar="X",
    help="refuse a merge that changes a logit by more than X times the largest (default: by the type that is written)",
  )
  add("--dtype", metavar="TYPE", help="float32, bfloat16 or float16 (default: as the weights are)")
  add("--quantize", metavar="TYPE", help="the type of a gguf file's matrices: q8_0, q4_0, q4_1, …")
  add("--family", metavar="NAME", help="the Hugging Face model_type to write (default: the first that fits)")
  add("--max-shard-size", default="5GB", metavar="SIZE", help="of one safetensors file (default: 5GB)")
  return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
  """Runs the door; returns the exit code."""
  args = parse(argv)
  format = args.format or ("hf" if args.merge else None)
  if format is None:
    raise ConfigError("--format is missing; choose jaxllm, hf or gguf")
  max_shard_bytes = parse_size(args.max_shard_size)
  from jaxllm.interop.open import open_model
  from jaxllm.interop.write import write_model

  start = time.monotonic()
  model = open_model(args.source, adapter=args.adapter, step=args.step, merge=not args.merge, own_apart=args.merge)
  if args.merge:
    _check_merge(model, args)
  write_model(
    model,
    args.to,
    format=format,
    dtype=args.dtype,
    quantize=args.quantize,
    family=args.family,
    max_shard_bytes=max_shard_bytes,
  )
  count = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
  print(f"{args.to}: {count:,} parameters written in {time.monotonic() - start:.1f} s", file=sys.stderr)
  return 0


def _check_merge(model: "StoredModel", args: argparse.Namespace) -> None:
  """Prints by how much merging changes the logits. Raises ConfigError where that is too much, or nothing is apart."""
  from jaxllm.inference.merging import merge_difference

  if not model.apart:
    raise ConfigError(f"{args.source} has no adapter to merge; name one with --adapter=DIR, or leave --merge out")
  found = merge_difference(model, args.dtype)
  line = f"merging changes logits by up to {found.largest:.2e}, the largest being {found.scale:.3g}"
  if not found.within(args.max_difference):
    allowed = found.allowed if args.max_difference is None else args.max_difference
    raise ConfigError(f"{line}, which is over --max-difference {allowed:g} times that; nothing is written")
  print(line, file=sys.stderr)


def parse_size(text: str) -> int:
  """Bytes of a size like "5GB" or "500MB" (powers of ten; KiB, MiB, GiB: of two).

  Raises:
    ConfigError: it is none.
  """
  units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
  match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)", text.strip().upper())
  if not match or match[2] not in units or float(match[1]) * units[match[2]] < 1:
    raise ConfigError(f"--max-shard-size is {text!r}; give a size like 5GB or 500MB")
  return int(float(match[1]) * units[match[2]])


if __name__ == "__main__":
  sys.exit(run_door(main))

"""How fast a model writes: `python -m jaxllm.bench generate --model=DIR --json=FILE`."""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.base.files import write_atomically
from jaxllm.cli import add_model, door_parser, path_argument, run_door

if TYPE_CHECKING:
  from jaxllm.inference.llm import LLM

EXAMPLES = """
examples:
  python -m jaxllm.bench generate --model=my-model
  python -m jaxllm.bench generate --model=my-model --dtype=float32,bfloat16 --batch=1,8,16 --json=speed.json
"""


@dataclasses.dataclass(frozen=True)
class Speed:
  """Medians over the repetitions, of one batch size and precision."""

  dtype: str
  quantization: str | None
  batch: int
  prompt_tokens: int
  new_tokens: int
  prefill_tokens_per_second: float  # prompts read, all rows together
  first_token_seconds: float  # latency until every row has one
  token_seconds: float  # latency of a token behind it
  decode_tokens_per_second: float  # throughput, all rows together


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line's settings."""
  parser = door_parser("bench", "Measures how fast a model reads and writes.", EXAMPLES)
  parser.add_argument("what", choices=["generate"])
  add_model(parser)
  add = parser.add_argument
  add("--dtype", metavar="TYPES", default="", help="comma-separated: float32, bfloat16 (default: as stored)")
  add("--quantization", metavar="FORMATS", default="", help="comma-separated: int8, int4, nf4 (default: none)")
  add("--batch", metavar="NUMBERS", default="1,8", help="rows at once, comma-separated (default: 1,8)")
  add("--prompt-tokens", type=int, default=64, metavar="N")
  add("--max-tokens", type=int, default=64, metavar="N", help="tokens that each row draws (default: 64)")
  add("--repeats", type=int, default=3, metavar="N")
  add("--json", type=path_argument, metavar="FILE", help="where the figures go")
  return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
  """Runs the door; returns the exit code."""
  args = parse(argv)
  batches = _numbers("--batch", args.batch)
  for name in ("prompt_tokens", "max_tokens", "repeats"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
  if args.json is not None and not args.json.absolute().parent.is_dir():
    raise ConfigError(f"--json={args.json}: there is no folder {args.json.absolute().parent}")
  import jax

  from jaxllm.inference.llm import LLM

  found = []
  for dtype in args.dtype.split(",") if args.dtype else [None]:
    for quantization in [None, *filter(None, args.quantization.split(","))]:
      length = args.prompt_tokens + args.max_tokens
      llm = LLM(
        args.model,
        adapter=args.adapter,
        dtype=dtype,
        quantization=quantization,
        max_model_len=length,
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
        row_buckets=batches,
      )
      for batch in batches:
        runs = [measure(llm, batch, args.prompt_tokens, args.max_tokens, seed) for seed in range(args.repeats)]
        found.append(_median(runs, llm.engine.compute.dtype, quantization, batch, args))
        print(_line(found[-1]), flush=True)
  if args.json is not None:
    device = jax.devices()[0]
    facts = {
      "model": str(args.model),
      "device": device.device_kind,
      "platform": device.platform,
      "jax": jax.__version__,
    }
    write_atomically(args.json, json.dumps(facts | {"speeds": [dataclasses.asdict(one) for one in found]}, indent=2))
  return 0


def measure(llm: "LLM", batch: int, prompt_tokens: int, max_tokens: int, seed: int) -> dict[str, float]:
  """Seconds until every row has its first token, and until all are done; one dispatch a step, as a server does it.

  Raises:
    DataError: a row ends before that, as where logits are not finite.
  """
  import numpy as np

  from jaxllm.inference.engine import Request
  from jaxllm.inference.params import SamplingParams

  draws = np.random.default_rng(seed)
  vocab, sampling = llm.model.config.vocab_size, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
  engine, drawn = llm.engine, dict[int, int]()
  start, first = time.perf_counter(), 0.0
  for _ in range(batch):
    drawn[engine.submit(Request(draws.integers(0, vocab, prompt_tokens).tolist(), sampling))] = 0
  while engine.busy:
    for delta in engine.step():
      if delta.error is not None:
        raise DataError(delta.error)
      drawn[delta.id] += len(delta.token_ids)
    if not first and all(drawn.values()):
      first = time.perf_counter() - start
  return {"first": first, "all": time.perf_counter() - start, "tokens": float(sum(drawn.values()))}


def _median(runs: list[dict[str, float]], dtype: str, quantization, batch: int, args) -> Speed:
  first = statistics.median(run["first"] for run in runs)
  rest = statistics.median(run["all"] - run["first"] for run in runs)
  behind = max(1, args.max_tokens - 1)
  return Speed(
    dtype=dtype,
    quantization=quantization,
    batch=batch,
    prompt_tokens=args.prompt_tokens,
    new_tokens=args.max_tokens,
    prefill_tokens_per_second=batch * args.prompt_tokens / first,
    first_token_seconds=first,
    token_seconds=rest / behind,
    decode_tokens_per_second=batch * (args.max_tokens - 1) / rest if args.max_tokens > 1 else 0.0,
  )


def _line(speed: Speed) -> str:
  weights = speed.dtype + (f" {speed.quantization}" if speed.quantization else "")
  return (
    f"{weights:16} batch {speed.batch:3}: {speed.prefill_tokens_per_second:8.1f} tok/s read, "
    f"{speed.decode_tokens_per_second:8.1f} tok/s written, first token {speed.first_token_seconds * 1e3:.0f} ms, "
    f"then {speed.token_seconds * 1e3:.1f} ms each"
  )


def _numbers(name: str, text: str) -> list[int]:
  values: list[Any] = text.split(",")
  if not all(value.strip().isdecimal() and int(value) > 0 for value in values):
    raise ConfigError(f"{name} is {text!r}; it must be whole numbers of at least 1, comma-separated")
  return sorted(int(value) for value in values)


if __name__ == "__main__":
  import sys

  sys.exit(run_door(main))

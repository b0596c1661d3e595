"""Measures `prepare`: seconds, megabytes per second, memory and what a start costs, at several sizes and numbers of
processes, beside the tokenizer's own speed on one core in the same run.

python tools/measure_prepare.py [--gigabytes=0.02,0.1] [--processes=1,2] [--kind=jsonl] [--tokenizer=sentencepiece]
  [--text=GLOB] [--document_bytes=3000] [--seq_len=1024] [--dir=DIR] [--json=FILE]

The corpus is made of real text (--text, the standard library's sources by default), shuffled by lines so that it can
be as large as one likes. Each job runs in a process of its own; memory is the largest sum over all of its processes.
"""

import argparse
import dataclasses
import glob
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig

_LINES = 200_000  # of real text, of which documents are made
_SPEED_BYTES = 20_000_000  # tokenized to measure a tokenizer alone
_JOB = """
import dataclasses, json, os, sys, time
from jaxllm.base.settings import from_mapping
from jaxllm.data import prepare as module
from jaxllm.data.config import DataConfig
original, spans = module.do_stage, {}
def timed(job, stage, *rest, **more):
  started = time.monotonic()
  original(job, stage, *rest, **more)
  spans[stage] = time.monotonic() - started
module.do_stage = timed
config = from_mapping(DataConfig, json.loads(sys.argv[1]))
if sys.argv[2] == "1":  # one core, as the tokenizer alone has
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  from jaxllm.data.tokenizers import sentencepiece
  sentencepiece.THREADS = 1
info = module.prepare(config, log=lambda line: print(line, file=sys.stderr), processes=int(sys.argv[2]))
p = info.prepared
print(json.dumps({"seconds": info.seconds, "stages": spans, "tokens": p.total("train", "tokens"),
  "documents": p.total("train", "documents"), "shards": p.total("train", "shards"), "duplicates": p.duplicates,
  "index_bytes": sum(facts[0] for name, facts in p.files.items() if name.startswith(("token_counts", "long_")))}))
"""
_START = """
import json, resource, sys, time
from pathlib import Path
from jaxllm.base.settings import from_mapping
from jaxllm.data import plans
from jaxllm.data.config import DataConfig
from jaxllm.data.pipeline import train_batches
plans._SMALL = 1
config = from_mapping(DataConfig, json.loads(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.monotonic()
batches = train_batches(config, batch_size=8, seq_len=int(sys.argv[2]), seed=0)
planned = time.monotonic() - started
next(batches)
first = time.monotonic() - started
batches.close()
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
kept = sum(path.stat().st_size for path in Path(config.dir).glob("build-*/plans/**/*") if path.is_file())
print(json.dumps({"plan_s": planned, "first_batch_s": first, "memory_grown_bytes": grown, "plan_bytes": kept}))
"""


def documents(lines: list[str], size: int, mean_bytes: int, seed: int = 0) -> Iterator[str]:
  """Documents of shuffled lines, of lengths spread around the mean, `size` bytes in all."""
  draw, made = random.Random(seed), 0
  while made < size:
    wanted, parts, held = draw.expovariate(1 / mean_bytes) + 100, [], 0
    while held < wanted:
      parts.append(lines[draw.randrange(len(lines))])
      held += len(parts[-1])
    text = "".join(parts)
    made += len(text.encode())
    yield text


def write_corpus(folder: Path, kind: str, lines: list[str], size: int, mean_bytes: int) -> str:
  """Writes one corpus; returns the glob of its files."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = documents(lines, size, mean_bytes)
  if kind == "jsonl":
    with (folder / "corpus.jsonl").open("w") as file:
      file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
    return str(folder / "corpus.jsonl")
  if kind == "text":
    for number, text in enumerate(rows):
      (folder / f"{number // 1000:04d}").mkdir(exist_ok=True)
      (folder / f"{number // 1000:04d}" / f"{number:07d}.txt").write_text(text)
    return f"{folder}/*/*.txt"
  import pyarrow
  import pyarrow.parquet

  schema = pyarrow.schema([("text", pyarrow.string())])
  with pyarrow.parquet.ParquetWriter(folder / "corpus.parquet", schema) as writer:
    batch: list[str] = []
    for text in rows:
      batch.append(text)
      if len(batch) == 1000:
        writer.write_table(pyarrow.table({"text": batch}, schema))
        batch = []
    writer.write_table(pyarrow.table({"text": batch}, schema))
  return str(folder / "corpus.parquet")


def make_tokenizer(kind: str, lines: list[str], folder: Path) -> str:
  """A tokenizer trained on some of the lines; returns its path."""
  if kind == "tokenizers":
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=16_000, special_tokens=["<|endoftext|>"], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(lines[:50_000], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return str(folder)
  from jaxllm.data.train_tokenizer import train_sentencepiece

  text = "".join(lines[:50_000]).encode()
  train_sentencepiece([text], TokenizerConfig(vocab_size=8000)).save(folder)
  return str(folder)


def own_speed(path: str, lines: list[str], mean_bytes: int) -> float:
  """Bytes per second of the tokenizer's library on one core, with nothing around it."""
  texts = list(documents(lines, _SPEED_BYTES, mean_bytes, seed=1))
  size = sum(len(text.encode()) for text in texts)
  if (Path(path) / "tokenizer.json").exists():
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    made = tokenizers.Tokenizer.from_file(str(Path(path) / "tokenizer.json"))
    started = time.monotonic()
    for start in range(0, len(texts), 100):
      made.encode_batch_fast(texts[start : start + 100], add_special_tokens=False)
  else:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(Path(path) / "tokenizer.model"))
    started = time.monotonic()
    for start in range(0, len(texts), 100):
      processor.encode(texts[start : start + 100], num_threads=1)
  return size / (time.monotonic() - started)


def memory_of_tree(pid: int) -> int:
  """Resident bytes of a process and all below it; pages that they share are counted once (PSS)."""
  total, waiting = 0, [pid]
  while waiting:
    one = waiting.pop()
    try:
      rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
      total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
      for task in Path(f"/proc/{one}/task").iterdir():
        waiting += map(int, (task / "children").read_text().split())
    except (OSError, ValueError):
      continue
  return total


def run_job(code: str, *arguments: str) -> dict[str, Any]:
  """What a job prints, and the most memory that all of its processes had."""
  process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
  peak, done = 0, threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.1):
      peak = max(peak, memory_of_tree(process.pid))

  thread = threading.Thread(target=watch)
  thread.start()
  out, _ = process.communicate()
  done.set()
  thread.join()
  if process.returncode:
    raise SystemExit(f"the job ended with code {process.returncode}")
  return json.loads(out.splitlines()[-1]) | {"peak_bytes": peak}


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """All sizes with all numbers of processes."""
  root = Path(args.dir)
  lines: list[str] = []
  for path in sorted(glob.glob(args.text, recursive=True)):
    lines += Path(path).read_text(errors="ignore").splitlines(keepends=True)
    if len(lines) > _LINES:
      break
  tokenizer = make_tokenizer(args.tokenizer, lines, root / args.tokenizer)
  speed = own_speed(tokenizer, lines, args.document_bytes)
  print(f"{args.tokenizer} alone on one core: {speed / 1e6:.2f} MB/s")
  print(
    f"{'GB':>7}{'processes':>11}{'seconds':>9}{'survey MB/s':>13}{'tokenize MB/s':>15}{'whole MB/s':>12}{'of own':>8}"
    f"{'peak MB':>9}{'plan s':>8}{'again s':>9}{'index B/doc':>13}{'plan B/doc':>12}"
  )
  rows = []
  for gigabytes in map(float, args.gigabytes.split(",")):
    folder = root / f"corpus-{gigabytes}"
    path = write_corpus(folder, args.kind, lines, round(gigabytes * 1e9), args.document_bytes)
    size = sum(os.path.getsize(file) for file in glob.glob(path))
    for processes in map(int, args.processes.split(",")):
      prepared = root / "prepared"
      shutil.rmtree(prepared, ignore_errors=True)
      source = SourceConfig(kind=args.kind, path=path, name="corpus")
      config = DataConfig(str(prepared), (source,), TokenizerConfig(tokenizer), packing=args.packing)
      told = json.dumps(dataclasses.asdict(config))
      found = run_job(_JOB, told, str(processes))
      starts = [run_job(_START, told, str(args.seq_len)) for _ in range(2)]
      row = found | {
        "gigabytes": size / 1e9,
        "processes": processes,
        "survey_mb_s": size / 1e6 / found["stages"]["survey"],
        "tokenize_mb_s": size / 1e6 / found["stages"]["tokenize"],
        "whole_mb_s": size / 1e6 / found["seconds"],
        "of_own_speed": size / found["seconds"] / speed / processes,
        "first_start": starts[0],
        "next_start": starts[1],
      }
      rows.append(row)
      print(
        f"{row['gigabytes']:>7.2f}{processes:>11}{row['seconds']:>9.1f}{row['survey_mb_s']:>13.0f}"
        f"{row['tokenize_mb_s']:>15.2f}{row['whole_mb_s']:>12.2f}{row['of_own_speed']:>8.0%}"
        f"{row['peak_bytes'] / 1e6:>9.0f}{starts[0]['plan_s']:>8.2f}{starts[1]['plan_s']:>9.2f}"
        f"{row['index_bytes'] / row['documents']:>13.1f}{starts[0]['plan_bytes'] / row['documents']:>12.1f}"
      )
    if not args.keep:
      shutil.rmtree(folder)
  shutil.rmtree(root / "prepared", ignore_errors=True)
  slopes = slopes_of(rows)
  for processes, one in slopes.items():
    print(
      f"{processes} processes: {one['seconds_per_gb']:.1f} s and {one['peak_mb_per_gb']:+.0f} MB more for each GB; "
      + "1 TB: "
      + ", ".join(f"{hours:.1f} h on {cores} cores" for cores, hours in one["terabyte_hours"].items())
    )
  return {
    "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
    "settings": vars(args),
    "tokenizer_mb_s": speed / 1e6,
    "rows": rows,
    "slopes": slopes,
  }


def slopes_of(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
  """Between the smallest and the largest size: what a GB more costs, and a terabyte at that rate on some cores.

  Other numbers of cores are the measured number times as many: processes share nothing but the disk.
  """
  found = {}
  for processes in dict.fromkeys(row["processes"] for row in rows):
    mine = sorted((row for row in rows if row["processes"] == processes), key=lambda row: row["gigabytes"])
    low, high = mine[0], mine[-1]
    if low is high:
      continue
    more = high["gigabytes"] - low["gigabytes"]
    seconds = (high["seconds"] - low["seconds"]) / more
    found[processes] = {
      "seconds_per_gb": seconds,
      "peak_mb_per_gb": (high["peak_bytes"] - low["peak_bytes"]) / 1e6 / more,
      "terabyte_hours": {n: seconds * 1000 * processes / n / 3600 for n in sorted({processes, 16, 64, 256})},
    }
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gigabytes", default="0.02,0.1")
  parser.add_argument("--processes", default="1,2")
  parser.add_argument("--kind", default="jsonl", choices=("jsonl", "text", "parquet"))
  parser.add_argument("--tokenizer", default="sentencepiece", choices=("sentencepiece", "tokenizers"))
  parser.add_argument("--text", default=f"{os.path.dirname(os.__file__)}/**/*.py")
  parser.add_argument("--document_bytes", type=int, default=3000)
  parser.add_argument("--packing", default="split", choices=("split", "best_fit", "first_fit", "none"))
  parser.add_argument("--seq_len", type=int, default=1024)
  parser.add_argument("--dir", default="data/measure_prepare", help="where corpora and builds go")
  parser.add_argument("--keep", action="store_true", help="the corpora, for another run")
  parser.add_argument("--json", help="where the figures go")
  args = parser.parse_args()
  found = measure(args)
  if args.json:
    Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
  main()

"""How fast the engine writes on the CPU beside transformers and llama.cpp: alternating rounds in one run, medians.

  python tools/bench_inference.py --model=model.gguf --llama-python=VENV/bin/python
  python tools/bench_inference.py --model=my-model --sides=int8,int4 --batches=1 --rounds=5

Each side is a process of its own that is idle while another one has its turn: ours in each precision (one dispatch a
step, as a server makes them; `ngram` beside `plain` on texts, greedily), transformers with its own cache, and llama.cpp
from a GGUF file with flash attention. Batches decode after prompts of random tokens; a prefill is one prompt up to its
first token. Memory is read in each round as well, so that the share of its bandwidth that a step's weights make up is
of the same minutes. Rounds during which other programs used the processor are left out. A side that cannot be had is
said and left out.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from sides import Side, machine, quiet_rounds, take_turns

SIDES = pathlib.Path(__file__).with_name("inference_sides")
OURS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "int8": ("bfloat16", "int8"),
        "int4": ("bfloat16", "int4")}  # fmt: skip
CODE = """def total(prices, tax):
  result = 0
  for price in prices:
    if price < 0:
      raise ValueError("a price is negative")
    result += price * (1 + tax)
  return round(result, 2)


def average(prices, tax):
  if not prices:
    return 0
  return total(prices, tax) / len(prices)
"""
FENCED = f"The code:\n```python\n{CODE}```\n\n"
# Texts that a model goes on with, and questions: where a small model is told to repeat something, it seldom does.
TEXTS = {
  "code edit": [
    f"{FENCED}The same code with a docstring in each function:\n```python\ndef total(prices, tax):\n"
    '  """Returns the sum of prices with tax."""\n  result = 0\n',
    f"{FENCED}The same code with type hints:\n```python\ndef total(prices: list[float], tax: float) -> float:\n",
  ],
  "repetition": [
    "The quick brown fox jumps over the lazy dog.\n" * 3,
    "| day | open | close |\n|---|---|---|\n| Monday | 9:00 | 17:00 |\n| Tuesday | 9:00 | 17:00 |\n",
  ],
  "chat": [
    "What is the capital of France, and what is it known for?",
    "Explain to a child why the sky is blue.",
    "Give me three ideas for a quiet weekend.",
  ],
}


def imports(python: str, module: str) -> bool:
  """Whether this Python has the module."""
  return subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0


def as_hf(args, folder: str, dtype: str) -> str:
  """A Hugging Face directory of the model: transformers computes a GGUF file's codes in another way."""
  if not args.model.endswith(".gguf"):
    return args.model
  command = [sys.executable, "-m", "jaxllm.convert", f"--from={args.model}", f"--to={folder}/{dtype}", "--format=hf"]
  where = SIDES.parent.parent
  subprocess.run([*command, f"--dtype={dtype}"], check=True, cwd=where, stdout=subprocess.DEVNULL)
  return f"{folder}/{dtype}"


def start(args, folder: str, cases: list[dict]) -> tuple[list[Side], list[str]]:
  """The sides that can be had, and what is said of the others."""
  common = {"model": args.model, "prompt": args.prompt, "steps": args.steps, "room": 0,
            "temperature": args.temperature, "ngram": False, "quantization": None, "cases": cases}  # fmt: skip
  wanted, sides, missing = args.sides.split(","), [], []
  sides.append(Side("memory", sys.executable, SIDES / "bandwidth_side.py", {}))
  for name in [name for name in wanted if name in OURS]:
    dtype, quantization = OURS[name]
    settings = common | {"dtype": dtype, "quantization": quantization}
    sides.append(Side(f"jaxllm {name}", sys.executable, SIDES / "jax_side.py", settings))
  if "texts" in wanted:
    texts = [
      {"kind": "text", "chat": of == "chat", "prompt": one, "drawn": args.drawn} for of in TEXTS for one in TEXTS[of]
    ]
    dtype, quantization = OURS[args.texts_in]
    settings = common | {"dtype": dtype, "quantization": quantization, "cases": texts, "room": args.drawn + 512}
    for name, ngram in (("plain", False), ("ngram", True)):
      sides.append(Side(f"jaxllm {name}", sys.executable, SIDES / "jax_side.py", settings | {"ngram": ngram}))
  for dtype in ("float32", "bfloat16"):
    if f"torch-{dtype}" in wanted:
      if imports(args.torch_python, "torch, transformers"):
        settings = common | {"dtype": dtype, "model": as_hf(args, folder, dtype)}
        sides.append(Side(f"transformers {dtype}", args.torch_python, SIDES / "torch_side.py", settings))
      else:
        missing.append(f"transformers {dtype}: no torch and transformers in {args.torch_python}")
  if "llama" in wanted:
    if not args.model.endswith(".gguf"):
      missing.append("llama.cpp: the model is no GGUF file")
    elif imports(args.llama_python, "llama_cpp"):
      settings = common | {"extra_buffers": args.llama_extra_buffers}
      sides.append(Side("llama.cpp", args.llama_python, SIDES / "llama_side.py", settings))
    else:
      missing.append(f"llama.cpp: no llama-cpp-python in {args.llama_python} (--llama-python)")
  return sides, missing


def without_folder(argument: str) -> str:
  """A flag with the name of its file alone: where it lies is nobody's business."""
  name, equals, value = argument.partition("=")
  return f"{name}={pathlib.Path(value).name}" if equals and pathlib.Path(value).is_absolute() else argument


def seconds(side: Side, rounds: list[int], case: int) -> float:
  return statistics.median(side.rounds[i][case] for i in rounds)


def summary(args, sides: list[Side], cases: list[dict]) -> dict:
  """What was measured, as it is written to the file."""
  quiet = quiet_rounds(sides, args.max_foreign)
  rounds = quiet or list(range(args.rounds))
  bandwidth = 1 / statistics.median(sides[0].rounds[i][0] for i in rounds)
  facts = {"rounds": args.rounds, "quiet_rounds": len(quiet), "read_gb_per_s": bandwidth, "sides": [], "texts": []}
  facts["read_gb_per_s_best"] = 1 / min(one[1] for one in sides[0].rounds)
  facts["foreign_cores"] = [round(max(side.foreign[i] for side in sides), 2) for i in range(args.rounds)]
  for side in sides[1:]:
    if side.name in ("jaxllm plain", "jaxllm ngram"):
      continue
    row = {"side": side.name, "version": side.version, "weight_bytes": side.answer["bytes"]}
    for i, case in enumerate(cases):
      each = [case["batch"] / one[i] if case["kind"] == "decode" else case["tokens"] / one[i] for one in side.rounds]
      name = f"decode_{case['batch']}" if case["kind"] == "decode" else f"prefill_{case['tokens']}"
      row[name] = statistics.median(each[i] for i in rounds)
      row[f"{name}_rounds"] = [round(x, 1) for x in each]
      if name == "decode_1":  # of the bandwidth of the same rounds
        row["bandwidth_share"] = statistics.median(
          side.answer["bytes"] / side.rounds[j][i] * sides[0].rounds[j][0] / 1e9 for j in rounds
        )
    facts["sides"].append(row)
  found = {side.name: side for side in sides}
  if "jaxllm ngram" in found:
    kinds = [of for of in TEXTS for _ in TEXTS[of]]
    plain, ngram = found["jaxllm plain"], found["jaxllm ngram"]
    for of in TEXTS:
      own = [i for i, kind in enumerate(kinds) if kind == of]
      total = [[sum(side.rounds[r][i] for i in own) for r in rounds] for side in (plain, ngram)]
      both = [len(own) / statistics.median(one) for one in total]
      ratio = statistics.median(a / b for a, b in zip(*total))
      facts["texts"].append({"of": of, "plain": both[0], "ngram": both[1], "ratio": ratio})
  return facts


def markdown(facts: dict) -> str:
  """The tables."""
  row = facts["sides"][0] if facts["sides"] else {}
  names = [name for name in row if name.startswith(("decode_", "prefill_")) and not name.endswith("_rounds")]
  title = lambda name: name.replace("decode_", "batch ").replace("prefill_", "prefill of ")  # noqa: E731
  lines = [f"| tok/s | {' | '.join(map(title, names))} | weights MB | of bandwidth at batch 1 |",
           "|---" * (len(names) + 3) + "|"]  # fmt: skip
  for row in facts["sides"]:
    share = f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else ""
    speeds = " | ".join(f"{row[name]:,.0f}" for name in names)
    lines.append(f"| {row['side']} | {speeds} | {row['weight_bytes'] / 1e6:.0f} | {share} |")
  if facts["texts"]:
    lines += ["", "| texts, tok/s | plain | ngram | ratio |", "|---|---|---|---|"]
    for row in facts["texts"]:
      lines.append(f"| {row['of']} | {row['plain']:.0f} | {row['ngram']:.0f} | {row['ratio']:.2f}x |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add("--model", required=True, help="a GGUF file, or a directory that both sides read")
  every = [*OURS, "texts", "torch-float32", "torch-bfloat16", "llama"]
  add("--sides", default=",".join(every), help=f"comma list of {{{','.join(every)}}}")
  add("--batches", default="1,8,16", help="rows that decode together; empty: none")
  add("--prefill", type=int, default=512, metavar="TOKENS", help="0: none")
  add("--prompt", type=int, default=64, metavar="TOKENS", help="before the steps that are measured")
  add("--steps", type=int, default=32, help="tokens that each row draws in a round")
  add("--temperature", type=float, default=0.0, help="of our sides; the others take the likeliest token")
  add("--drawn", type=int, default=128, metavar="TOKENS", help="of a text")
  add("--texts-in", choices=sorted(OURS), default="bfloat16", help="precision of the texts")
  add("--rounds", type=int, default=5)
  add("--max-foreign", type=float, default=0.15, help="cores that other programs may use in a round")
  add("--torch-python", default=sys.executable)
  add("--llama-python", default=sys.executable)
  add("--llama-extra-buffers", action="store_true", help="ggml's own layouts, AMX among them, which may crash")
  add("--out", help="write the figures as JSON to this file")
  args = parser.parse_args()
  cases = [{"kind": "decode", "batch": int(n)} for n in args.batches.split(",") if n]
  cases += [{"kind": "prefill", "tokens": args.prefill}] if args.prefill else []
  where = machine()
  print(f"{where['machine']}, prompts of {args.prompt}, {args.steps} steps a round", flush=True)
  args.model = str(pathlib.Path(args.model).resolve())
  with tempfile.TemporaryDirectory() as folder:
    sides, missing = start(args, folder, cases)
    for line in missing:
      print(f"left out: {line}", flush=True)
    take_turns(sides, args.rounds, 1)
  facts = summary(args, sides, cases)
  quiet = facts["quiet_rounds"]
  print(f"{quiet} of {args.rounds} rounds quiet" + ("" if quiet else ": NOT QUIET"))
  print(f"memory is read at {facts['read_gb_per_s']:.1f} GB/s (best {facts['read_gb_per_s_best']:.1f})")
  print(markdown(facts))
  if args.out:
    command = shlex.join(["python", "tools/bench_inference.py", *map(without_folder, sys.argv[1:])])
    versions = {side.name: side.version for side in sides}
    everything = where | {"command": command, "versions": versions, "left_out": missing} | facts
    pathlib.Path(args.out).write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
  main()

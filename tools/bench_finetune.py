"""Our fine-tuning steps on the CPU beside TRL's trainers with PEFT: alternating rounds in one run, medians, ratios.

  python tools/bench_finetune.py --model=smollm2-hf                         full, LoRA, QLoRA, DPO in float32
  python tools/bench_finetune.py --model=smollm2-hf --dtype=bfloat16
  python tools/bench_finetune.py --random --methods=lora,dpo                without a model's files

The model is any that `jaxllm.convert` reads; both sides load the Hugging Face directories that it writes, in the dtype
of the run (whole models that are trained: in float32). The jax side is the package's own compiled step, the torch side
is `SFTTrainer` and `DPOTrainer` with a PEFT config in Trainer's own loop, without gradient checkpointing. Both begin
with the same adapters and see the same tokens without padding, of which the first half is a prompt; the references of
DPO are computed in every step, with the adapters off; AdamW with the same settings. Losses are compared: a first loss
that differs by over 1e-4 in float32 is an error. Memory is what a process takes beyond its imports, at most, in steps
after the first three. QLoRA needs bitsandbytes (--bitsandbytes=DIR of `pip install --target`). Rounds during which
other programs used the processor are left out.
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

SIDES = pathlib.Path(__file__).with_name("finetune_sides")
METHODS = ("full", "lora", "qlora", "dpo")
FIRST_LOSS = 1e-4  # relative, in float32

# SmolLM2-135M's shape for --random, and one for tests
SHAPES = {
  "smollm2": dict(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True, max_position_embeddings=2048,
  ),
  "tiny": dict(
    vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=64,
  ),
}  # fmt: skip

RANDOM = """
import json, sys, torch, transformers
torch.manual_seed(0)
config = transformers.LlamaConfig(**json.loads(sys.argv[1]), bos_token_id=0, eos_token_id=1)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[2])
"""


def models(args, folder: str) -> dict[str, str]:
  """Hugging Face directories by dtype."""
  source = args.model
  if args.random:
    source = f"{folder}/random"
    subprocess.run([args.python_torch, "-c", RANDOM, json.dumps(SHAPES[args.random]), source], check=True)
  found = {}
  for dtype in {"float32", args.dtype}:
    found[dtype] = f"{folder}/{dtype}"
    command = [args.python_jax, "-m", "jaxllm.convert", f"--from={source}", f"--to={found[dtype]}", "--format=hf"]
    root = SIDES.parent.parent
    subprocess.run([*command, f"--dtype={dtype}"], check=True, cwd=root, stdout=subprocess.DEVNULL)
  return found


def compare(args, method: str, found: dict[str, str], folder: str) -> dict:
  """One method on all sides, in alternating rounds."""
  model = found["float32" if method == "full" else args.dtype]
  settings = {
    "method": method,
    "dtype": args.dtype,
    "model": model,
    "vocab": json.loads(pathlib.Path(model, "config.json").read_text())["vocab_size"],
    "adapter": f"{folder}/{method}.npz",
    "batch": args.batch if method != "dpo" else max(1, args.batch // 2),
    "length": args.length,
    "prompt": args.length // 2,
    "rank": args.rank,
    "alpha": 2.0 * args.rank,
    "learning_rate": 1e-5 if method == "full" else 1e-4,
    "double_quantize": args.double_quantize,
    "compute": {},
    "path": [args.bitsandbytes] if args.bitsandbytes else [],
  }
  sides = [Side("jaxllm", args.python_jax, SIDES / "jax_side.py", settings)]
  for mode in args.torch.split(","):
    sides.append(Side(f"TRL {mode}", args.python_torch, SIDES / "torch_side.py", settings | {"mode": mode}))
  take_turns(sides, args.rounds, args.steps)
  quiet = quiet_rounds(sides, args.max_foreign)
  tokens = settings["batch"] * settings["length"] * (2 if method == "dpo" else 1)
  rows = []
  for side in sides:
    seconds = statistics.median(t for i in quiet or range(args.rounds) for t in side.rounds[i])
    gap = max(abs(a - b) / abs(b) for a, b in zip(side.losses, sides[0].losses))
    rows.append(
      {"side": side.name, "version": side.version, "tokens_per_second": tokens / seconds, "ms": 1e3 * seconds,
       "first_loss": side.losses[0], "loss_curve": side.losses, "largest_loss_gap": gap}
      | {name: value for name, value in side.answer.items() if name not in ("times", "losses")}
    )  # fmt: skip
  return {"method": method, "tokens_per_step": tokens, "quiet_rounds": len(quiet), "rows": rows}


def frozen_bytes(found: list[dict]) -> dict | None:
  """What QLoRA saves of LoRA: frozen bytes, and how much of that the compiled step's peak falls."""
  ours = {one["method"]: one["rows"][0] for one in found}
  if not {"lora", "qlora"} <= ours.keys():
    return None
  lora, qlora = ours["lora"], ours["qlora"]
  saved = lora["frozen_bytes"] - qlora["frozen_bytes"]
  return {
    "lora_frozen_bytes": lora["frozen_bytes"],
    "qlora_frozen_bytes": qlora["frozen_bytes"],
    "share": qlora["frozen_bytes"] / lora["frozen_bytes"],
    "peak_falls_by_share_of_saving": (lora["compiled_peak_bytes"] - qlora["compiled_peak_bytes"]) / saved,
  }


def markdown(found: list[dict]) -> str:
  """The table: a row for each method, our side beside the fastest of the others."""
  lines = [
    "| method | jaxllm tok/s | TRL tok/s | ratio | jaxllm MiB | TRL MiB | compiled peak MiB | first losses |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for one in found:
    ours, *others = one["rows"]
    best = max(others, key=lambda row: row["tokens_per_second"])
    least = min(row["peak_bytes"] for row in others)
    name = best["side"].removeprefix("TRL ")
    lines.append(
      f"| {one['method']} | {ours['tokens_per_second']:,.0f} | {best['tokens_per_second']:,.0f} ({name}) "
      f"| {ours['tokens_per_second'] / best['tokens_per_second']:.2f}x | {ours['peak_bytes'] / 2**20:,.0f} "
      f"| {least / 2**20:,.0f} | {ours['compiled_peak_bytes'] / 2**20:,.0f} "
      f"| {ours['first_loss']:.5f}, {best['first_loss']:.5f} |"
    )
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", help="a model in files")
  parser.add_argument("--random", nargs="?", const="smollm2", choices=sorted(SHAPES), help="random weights, this shape")
  parser.add_argument("--methods", default=",".join(METHODS))
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
  parser.add_argument("--python-jax", default=sys.executable)
  parser.add_argument("--python-torch", default=sys.executable)
  parser.add_argument("--bitsandbytes", help="a folder to import it from")
  parser.add_argument("--double-quantize", action="store_true", help="the scales of QLoRA's base in 8 bits too")
  parser.add_argument("--torch", default="eager", help="comma list of {eager,compile}; in bfloat16 also pure")
  parser.add_argument("--batch", type=int, default=4, help="rows of a step, of both kinds for DPO")
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--rank", type=int, default=16)
  parser.add_argument("--steps", type=int, default=2, help="steps in a round")
  parser.add_argument("--rounds", type=int, default=4)
  parser.add_argument("--max-foreign", type=float, default=0.15, help="cores that other programs may use in a round")
  parser.add_argument("--out", help="write the figures as JSON to this file")
  args = parser.parse_args()
  if (args.model is None) == (args.random is None):
    parser.error("give either --model or --random")

  where, found = machine(), []
  print(f"{where['machine']}, {args.dtype}, {args.batch} rows of {args.length}, rank {args.rank}", flush=True)
  with tempfile.TemporaryDirectory() as folder:
    directories = models(args, folder)
    for method in args.methods.split(","):
      found.append(one := compare(args, method, directories, folder))
      quiet = one["quiet_rounds"]
      print(f"{method}: {quiet} of {args.rounds} rounds quiet" + ("" if quiet else ": NOT QUIET"), flush=True)
      for row in one["rows"]:
        peak, start, losses = row["peak_bytes"] / 2**20, row["peak_bytes_with_start"] / 2**20, len(row["loss_curve"])
        print(f"  {row['side']:16}{row['version']:48}{row['tokens_per_second']:7.0f} tokens/s {row['ms']:8.1f} ms   "
              f"peak {peak:6.0f} MiB (start {start:6.0f})   first loss {row['first_loss']:.6f}, gap of {losses} losses "
              f"{row['largest_loss_gap']:.1e}", flush=True)  # fmt: skip
  print(markdown(found))
  saving = frozen_bytes(found)
  if saving:
    print(f"QLoRA's frozen bytes are {saving['share']:.3f} of LoRA's; the compiled peak falls by "
          f"{saving['peak_falls_by_share_of_saving']:.2f} of what that saves")  # fmt: skip
  if args.out:
    command = shlex.join(["python", "tools/bench_finetune.py", *sys.argv[1:]])
    settings = {
      name: getattr(args, name) for name in ("dtype", "batch", "length", "rank", "steps", "rounds", "double_quantize")
    }
    facts = where | {"command": command} | settings | {"methods": found, "qlora": saving}
    pathlib.Path(args.out).write_text(json.dumps(facts, indent=2) + "\n")
  for one in found:
    first = [row["first_loss"] for row in one["rows"]]
    if args.dtype == "float32" and max(abs(x - first[0]) for x in first) > FIRST_LOSS * abs(first[0]):
      raise SystemExit(f"{one['method']}: the first losses differ: {first}")


if __name__ == "__main__":
  main()

"""Writes questions with checked answers, and right and wrong answers to them, as JSON lines to fine-tune on.

  python tools/make_tasks.py --tasks=chain_sum,gcd --count=2000 --seed=1 --out=data/tasks

OUT/sft.jsonl has prompt and completion, OUT/preference.jsonl prompt, chosen and rejected, all as messages. The
questions are reasoning-gym's, asked as `python -m jaxllm.evaluate --tasks=…` asks them; take another seed there.
"""

import argparse
import json
import random
from pathlib import Path


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", required=True)
  parser.add_argument("--count", type=int, default=1000, help="questions of each task")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--out", type=Path, required=True)
  args = parser.parse_args()

  import reasoning_gym

  from jaxllm.evaluation.verified import INSTRUCTION

  draw = random.Random(args.seed)
  answered, compared = [], []
  for task in args.tasks.split(","):
    dataset = reasoning_gym.create_dataset(task, size=args.count, seed=args.seed)
    entries = list(dataset)
    for entry in entries:
      ask = [{"role": "user", "content": f"{entry['question']}\n\n{INSTRUCTION}"}]
      say = lambda answer: [{"role": "assistant", "content": f"Answer: {answer}"}]  # noqa: E731
      answered.append({"prompt": ask, "completion": say(entry["answer"])})
      others = [other["answer"] for other in entries if dataset.score_answer(other["answer"], entry=entry) < 1]
      if others:
        compared.append({"prompt": ask, "chosen": say(entry["answer"]), "rejected": say(draw.choice(others))})
  args.out.mkdir(parents=True, exist_ok=True)
  for name, rows in (("sft", answered), ("preference", compared)):
    draw.shuffle(rows)
    (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} rows in {args.out / name}.jsonl")


if __name__ == "__main__":
  main()

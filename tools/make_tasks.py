"""Writes questions with checked answers, and right and wrong answers to them, as JSON lines to fine-tune on.

  python tools/make_tasks.py --tasks=chain_sum,gcd --count=2000 --seed=1 --out=data/tasks

OUT/sft.jsonl has prompt and completion, OUT/preference.jsonl prompt, chosen and rejected, all as messages. The
questions are reasoning-gym's, asked as `python -m jaxllm.evaluate --tasks=…` asks them; take another seed there.
A rejected answer is that to another question, or with --model=PATH a wrong one which that model gives to this question
(questions that it never gets wrong have no pair).
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
  parser.add_argument("--model", help="whose own wrong answers are the rejected ones")
  parser.add_argument("--samples", type=int, default=4, help="answers of the model to each question")
  parser.add_argument("--temperature", type=float, default=1.0)
  parser.add_argument("--max-tokens", type=int, default=24)
  args = parser.parse_args()

  import reasoning_gym

  from jaxllm.evaluation.verified import INSTRUCTION, questions_of
  from jaxllm.inference.load import load_model

  model = load_model(args.model) if args.model else None

  draw = random.Random(args.seed)
  answered, compared = [], []
  for task in args.tasks.split(","):
    questions = questions_of([task], args.count, args.seed)
    right = [entry["answer"] for entry in reasoning_gym.create_dataset(task, size=args.count, seed=args.seed)]
    asked = [[{"role": "user", "content": f"{question.text}\n\n{INSTRUCTION}"}] for question in questions]
    replies = answers_of(model, asked, args) if model else [right] * len(right)
    for ask, question, answer, others in zip(asked, questions, right, replies, strict=True):
      say = lambda answer: [{"role": "assistant", "content": f"Answer: {answer}"}]  # noqa: E731
      answered.append({"prompt": ask, "completion": say(answer)})
      wrong = [other for other in others if other and question.score(other) < 1]
      if wrong:
        compared.append({"prompt": ask, "chosen": say(answer), "rejected": say(draw.choice(wrong))})
  args.out.mkdir(parents=True, exist_ok=True)
  for name, rows in (("sft", answered), ("preference", compared)):
    draw.shuffle(rows)
    (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows):,} rows in {args.out / name}.jsonl")


def answers_of(model, asked, args, batch_size=32) -> list[list[str]]:
  """What the model answers to each question, `args.samples` times."""
  from jaxllm.evaluation.verified import answer_in

  answers: list[list[str]] = [[] for _ in asked]
  for start in range(0, len(asked), batch_size):
    prompts = [model.chat_ids(messages) for messages in asked[start : start + batch_size]]
    settings = {"temperature": args.temperature, "max_tokens": args.max_tokens, "n": args.samples}
    draws = [model.sampling(**settings, seed=args.seed * 2**32 + start + i) for i in range(len(prompts))]
    for completion in model.generate(prompts, draws):
      answers[start + completion.prompt_index].append(answer_in(completion.text))
  return answers


if __name__ == "__main__":
  main()

"""Writes questions about Python's standard library with the answers that its documentation gives, as JSON lines.

  python tools/make_instructions.py --count=2000 --seed=1 --out=data/python/instructions.jsonl

The answers are the first paragraphs of the docstrings of the interpreter that runs this; prompt and completion are
messages.
"""

import argparse
import inspect
import json
import random
import sysconfig
from pathlib import Path

from jaxllm.data.python_functions import python_functions

ASK = (
  "What does `{name}` in Python's module `{module}` do?",
  "Explain the Python function `{module}.{name}` in a few words.",
  "In Python, what is `{name}` of the module `{module}` for?",
)
SKIPPED = ("test", "tests", "idlelib", "lib2to3", "site-packages", "turtledemo", "ensurepip")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--count", type=int, default=2000, help="at most so many")
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--out", type=Path, required=True)
  args = parser.parse_args()
  root, draw = Path(sysconfig.get_paths()["stdlib"]), random.Random(args.seed)
  answers: dict[tuple[str, str], str] = {}
  for file in sorted(root.rglob("*.py")):
    path = file.relative_to(root)
    if any(part in SKIPPED or part.startswith("_") for part in path.with_suffix("").parts):
      continue
    for function in python_functions(file.read_bytes(), path.as_posix()):
      answer = " ".join(inspect.cleandoc(function["docstring"]).partition("\n\n")[0].split())
      if not function["name"].startswith("_") and 20 <= len(answer) <= 400:
        answers.setdefault((function["module"], function["name"]), answer)
  rows = []
  for (module, name), answer in answers.items():
    question = draw.choice(ASK).format(module=module, name=name)
    rows.append(
      {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
      }
    )
  draw.shuffle(rows)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text("".join(json.dumps(row) + "\n" for row in rows[: args.count]), encoding="utf-8")
  print(f"{len(rows[: args.count]):,} rows in {args.out}")


if __name__ == "__main__":
  main()

"""Every family as a tiny GGUF file in llama.cpp, beside our own numbers.

python tools/gguf_families.py [--out=experiments/benchmarks/gguf.json] [FAMILY …]

Needs the wheel xllamacpp. Prints a table: whether llama.cpp's greedy text is ours, and how far its log-probabilities
(of an encoder: its states of tokens) are from ours at most. Of a family that llama.cpp has no graph for, why it is not
written. --out records it: {family: {"equal", "largest_difference", "note"}}. Of tokenizers, see the tests of GGUF.
"""

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np

from jaxllm.base.errors import UserError
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.gguf import write_gguf
from jaxllm.interop.gguf.architectures import BY_MODEL_TYPE
from jaxllm.interop.gguf.encoders import WRITTEN_AS
from jaxllm.interop.huggingface import config_from_huggingface

sys.path.append(str(Path(__file__).parents[1] / "tests" / "interop"))
import gguf_models
from gguf_against_llama import greedy, labels, states, tolerance

MODELS = gguf_models.ALL | gguf_models.SEEING


def compare(file: Path, name: str) -> dict:
  """What llama.cpp makes of one of the models."""
  hf, tensors = gguf_models.checkpoint(name)
  config = config_from_huggingface(hf)
  if name in gguf_models.ENCODERS | gguf_models.RANKERS:
    ranks = name in gguf_models.RANKERS
    theirs, ours = (labels if ranks else states)(file, hf, tensors)
    facts, allowed = {"compared": "labels" if ranks else "states"}, 2e-2
  else:
    tokens, theirs, ours = greedy(file, hf, tensors)
    facts, allowed = {"compared": "log-probabilities", "greedy": ours.argmax(-1).tolist() == tokens}, tolerance(config)
  difference = float(np.abs(theirs - ours).max())
  return facts | {"largest_difference": difference, "equal": facts.get("greedy", True) and difference < allowed}


def family_facts(family: str, directory: Path) -> dict:
  """Of all models of a family that are tried, the worst."""
  names = [name for name, hf in MODELS.items() if hf["model_type"] == family]
  if not names:
    try:
      write_gguf(directory / "x.gguf", {"model_type": family}, {}, None)
    except UserError as error:
      return {"equal": None, "largest_difference": None, "note": f"not written: {str(error).partition(';')[0]}"}
    return {"equal": None, "largest_difference": None, "note": "not tried"}
  found = {name: compare(directory / f"{name}.gguf", name) for name in names}
  worst = max(found.values(), key=lambda facts: (not facts["equal"], facts["largest_difference"]))
  architecture = BY_MODEL_TYPE[WRITTEN_AS.get(family, family)]
  return worst | {"models": names, "note": f"as {architecture.name}"}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY")
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  facts = {}
  print("| family | equal | compared | largest difference | note |\n|---|---|---|---|---|")
  for family in args.families:
    with tempfile.TemporaryDirectory() as directory:
      try:
        found = family_facts(family, Path(directory))
      except Exception:
        traceback.print_exc()
        found = {"equal": False, "largest_difference": None, "note": "llama.cpp does not load or compute it"}
    facts[family] = found
    difference = "" if found["largest_difference"] is None else f"{found['largest_difference']:.1e}"
    print(f"| {family} | {found['equal']} | {found.get('compared', '')} | {difference} | {found['note']} |", flush=True)
  if args.out:
    args.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
  main()

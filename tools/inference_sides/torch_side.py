"""transformers' side of `bench_inference.py`: a forward pass with its dynamic cache a step."""

import json
import sys
import time

import numpy as np
import torch
import transformers

settings = json.loads(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], dtype=settings["dtype"]).eval()
random = np.random.default_rng(0)


def tokens(rows: int, count: int) -> torch.Tensor:
  return torch.from_numpy(random.integers(10, model.config.vocab_size - 10, (rows, count)))


@torch.inference_mode()
def decode(case: dict) -> float:
  """Seconds of a step, the median."""
  out = model(tokens(case["batch"], settings["prompt"]), use_cache=True, logits_to_keep=1)
  times = []
  for _ in range(settings["steps"]):
    start = time.perf_counter()
    out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    times.append(time.perf_counter() - start)
  return float(np.median(times[2:]))


@torch.inference_mode()
def read(case: dict) -> float:
  """Seconds until a prompt's first token is there."""
  prompt = tokens(1, case["tokens"])
  start = time.perf_counter()
  model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)
  return time.perf_counter() - start


nominal = sum(p.nbytes for p in model.parameters())
print(json.dumps(f"transformers {transformers.__version__}, torch {torch.__version__}"), flush=True)
for _ in sys.stdin:
  measured = {"decode": decode, "prefill": read}
  times = [measured[case["kind"]](case) for case in settings["cases"]]
  print(json.dumps({"bytes": nominal, "times": times, "losses": []}), flush=True)

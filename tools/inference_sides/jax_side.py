"""Our side of `bench_inference.py`: steps of the engine as a server makes them, one dispatch each."""

import json
import sys
import time

import jax
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.inference.engine import Request
from jaxllm.kernels import QuantizedWeight

settings = json.loads(sys.argv[1])
cases, length = settings["cases"], settings["prompt"] + settings["steps"] + 16
batches = [case["batch"] for case in cases if case["kind"] == "decode"] or [1]
prefill = max([case["tokens"] for case in cases if case["kind"] == "prefill"], default=128)
llm = LLM(
  settings["model"],
  dtype=settings["dtype"],
  quantization=settings["quantization"],
  max_model_len=max(length, prefill + 16, settings["room"]),
  max_num_seqs=max(batches),
  max_num_batched_tokens=max(prefill, 512),
  row_buckets=batches,
  token_buckets=sorted({128, 512, prefill}),
  enable_prefix_caching=False,
  max_logprobs=1,
  speculative={"method": "ngram"} if settings["ngram"] else None,
)
engine, random = llm.engine, np.random.default_rng(0)


def submit(count: int, tokens: int, drawn: int) -> None:
  for seed in range(count):
    prompt = random.integers(10, llm.model.config.vocab_size - 10, tokens).tolist()
    how = SamplingParams(temperature=settings["temperature"], max_tokens=drawn, ignore_eos=True, seed=seed)
    engine.submit(Request(prompt, how))


def decode(case: dict) -> float:
  """Seconds of a step, the median."""
  submit(case["batch"], settings["prompt"], settings["steps"])
  times = []
  while engine.busy:
    start = time.perf_counter()
    engine.step()
    times.append(time.perf_counter() - start)
  return float(np.median(times[-settings["steps"] + 4 : -3]))


def read(case: dict) -> float:
  """Seconds until a prompt's first token is there."""
  submit(1, case["tokens"], 1)
  start = time.perf_counter()
  while engine.busy:
    engine.step()
  return time.perf_counter() - start


def text(case: dict) -> float:
  """Seconds of a token of a text, its prompt's time included."""
  how, start = SamplingParams(temperature=0, max_tokens=case["drawn"], ignore_eos=True), time.perf_counter()
  if case["chat"]:
    found = llm.chat([{"role": "user", "content": case["prompt"]}], how)
  else:
    found = llm.generate([case["prompt"]], how)
  return (time.perf_counter() - start) / len(found[0].outputs[0].token_ids)


def stored(path: str, w) -> int:
  """Bytes of a weight that a token needs, without padding; not of a table that is only looked up in."""
  if "embedding" in path and not llm.model.config.tie_embeddings:
    return 0
  base = getattr(w, "base", w)
  if not isinstance(base, QuantizedWeight):
    return w.nbytes
  codes = base.values.shape[-2] * base.in_features // (2 if base.packed else 1)
  return codes + sum(x.nbytes for x in (base.scales, base.zeros) if x is not None)


whole = lambda w: hasattr(w, "base") or isinstance(w, QuantizedWeight)  # noqa: E731
leaves = jax.tree_util.tree_leaves_with_path(llm.model._weights, is_leaf=whole)
nominal = sum(stored(jax.tree_util.keystr(path), w) for path, w in leaves)

print(json.dumps(f"jaxllm, jax {jax.__version__}"), flush=True)
for _ in sys.stdin:
  measured = {"decode": decode, "prefill": read, "text": text}
  print(
    json.dumps({"times": [measured[case["kind"]](case) for case in cases], "losses": [], "bytes": nominal}), flush=True
  )

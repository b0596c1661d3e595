"""llama.cpp's side of `bench_inference.py`, by llama-cpp-python's low-level calls: a batch of all rows a step."""

import json
import os
import sys
import time

import llama_cpp as lib
import numpy as np

settings = json.loads(sys.argv[1])
cases, random = settings["cases"], np.random.default_rng(0)
most = max(case.get("batch", 1) for case in cases)
held = max(most * (settings["prompt"] + settings["steps"] + 16), 2048)
cores = os.cpu_count()
lib.llama_backend_init()
how = lib.llama_model_default_params()
how.use_extra_bufts = settings["extra_buffers"]  # ggml's layouts for AMX
model = lib.llama_model_load_from_file(settings["model"].encode(), how)
vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
params = lib.llama_context_default_params()
params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.kv_unified = held, 512, 512, most, True
params.n_threads = params.n_threads_batch = cores
params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
context = lib.llama_init_from_model(model, params)
batch = lib.llama_batch_init(512, 0, 1)


def compute(entries: list[tuple[int, int, int, bool]]) -> None:
  """Of each token its id, position and row, and whether its logits are wanted."""
  batch.n_tokens = len(entries)
  for i, (token, position, row, wanted) in enumerate(entries):
    batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
    batch.seq_id[i][0] = row
  assert lib.llama_decode(context, batch) == 0


def clear() -> None:
  lib.llama_memory_clear(lib.llama_get_memory(context), True)


def likeliest(index: int) -> int:
  return int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, index), (vocab,)).argmax())


def decode(case: dict) -> float:
  """Seconds of a step, the median."""
  clear()
  rows, at = range(case["batch"]), settings["prompt"]
  for row in rows:
    prompt = random.integers(10, vocab - 10, at)
    compute([(int(token), i, row, i == at - 1) for i, token in enumerate(prompt)])
  drawn, times = [100 + row for row in rows], []
  for step in range(settings["steps"]):
    start = time.perf_counter()
    compute([(drawn[row], at + step, row, True) for row in rows])
    drawn = [likeliest(row) for row in rows]
    times.append(time.perf_counter() - start)
  return float(np.median(times[2:]))


def read(case: dict) -> float:
  """Seconds until a prompt's first token is there."""
  clear()
  prompt = random.integers(10, vocab - 10, case["tokens"])
  start = time.perf_counter()
  for begin in range(0, len(prompt), 512):
    part = prompt[begin : begin + 512]
    compute([(int(t), begin + i, 0, begin + i == len(prompt) - 1) for i, t in enumerate(part)])
  likeliest(len(prompt[-512:]) - 1)
  return time.perf_counter() - start


nominal = os.path.getsize(settings["model"])
print(json.dumps(f"llama-cpp-python {lib.__version__}"), flush=True)
for _ in sys.stdin:
  measured = {"decode": decode, "prefill": read}
  times = [measured[case["kind"]](case) for case in cases]
  print(json.dumps({"bytes": nominal, "times": times, "losses": []}), flush=True)

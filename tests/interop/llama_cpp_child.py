"""llama.cpp in a process of its own: it may crash, and writes to the terminal.

Reads from stdin {"file", "embedding", "posts": [[path, body], …]} and writes the answers into the file that its
argument names.
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path


def ask(file, *posts, embedding=False):
  """What llama.cpp's server answers, with a model, to each (path, body); `embedding`: with the states of tokens."""
  out = Path(f"{file}.answers")
  request = json.dumps({"file": str(file), "posts": posts, "embedding": embedding})
  done = subprocess.run([sys.executable, __file__, out], input=request, capture_output=True, text=True, timeout=120)
  assert out.exists(), done.stderr[-2000:]
  return json.loads(out.read_text())


def main():
  import xllamacpp

  request = json.load(sys.stdin)
  params = xllamacpp.CommonParams()
  params.model.path = request["file"]
  params.n_ctx, params.n_batch, params.n_parallel, params.warmup = 128, 128, 1, False
  params.cpuparams.n_threads = 1
  params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  if request["embedding"]:
    params.embedding, params.n_ubatch = True, 128
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
  server = xllamacpp.Server(params)
  answers = []
  for path, body in request["posts"]:
    post = urllib.request.Request(
      server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(post) as answer:
      answers.append(json.load(answer))
  Path(sys.argv[1]).write_text(json.dumps(answers))
  os._exit(0)  # its threads do not end


if __name__ == "__main__":
  main()

"""llama.cpp in a process of its own: it may crash, and writes to the terminal.

Reads from stdin {"file", "embedding", "posts": [[path, body], …]} and writes the answers into the file that its
argument names. The path "encode" is not of the server, which has no encoder-decoders: {"prompt", "steps", "vocab"} is
answered with greedy tokens and the logits of each.
"""

import ctypes
import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path


def ask(file, *posts, embedding=False):
  """What llama.cpp's server answers, with a model, to each (path, body); `embedding`: with the states of tokens, or
  "pooled", with the vector that the file says, or "rank", as a server of answers' ranks."""
  out = Path(f"{file}.answers")
  request = json.dumps({"file": str(file), "posts": posts, "embedding": embedding})
  done = subprocess.run([sys.executable, __file__, out], input=request, capture_output=True, text=True, timeout=120)
  assert out.exists(), done.stderr[-2000:]
  return json.loads(out.read_text())


class _Batch(ctypes.Structure):
  """llama_batch: as many tokens as the first number says."""

  _fields_ = [("n_tokens", ctypes.c_int32), *((f"field{i}", ctypes.c_void_p) for i in range(6))]


class _Params(ctypes.Structure):
  """Settings that llama.cpp makes and reads: more bytes than any version has."""

  _fields_ = [("bytes", ctypes.c_byte * 1024)]


def encode(library, file, prompt, steps, vocab):
  """Greedy tokens of an encoder-decoder, and the logits of each."""
  import numpy as np

  lib = ctypes.CDLL(library)
  lib.llama_model_default_params.restype = lib.llama_context_default_params.restype = _Params
  lib.llama_model_load_from_file.restype = lib.llama_init_from_model.restype = ctypes.c_void_p
  lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _Params]
  lib.llama_init_from_model.argtypes = [ctypes.c_void_p, _Params]
  lib.llama_batch_get_one.restype = _Batch
  lib.llama_encode.argtypes = lib.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
  lib.llama_get_logits_ith.argtypes = [ctypes.c_void_p, ctypes.c_int32]
  lib.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
  lib.llama_model_decoder_start_token.argtypes = [ctypes.c_void_p]
  lib.llama_backend_init()
  lib.ggml_backend_load_all()
  model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
  context = lib.llama_init_from_model(model, lib.llama_context_default_params())

  def run(function, tokens):
    array = (ctypes.c_int32 * len(tokens))(*tokens)
    assert function(context, lib.llama_batch_get_one(array, len(tokens))) == 0

  run(lib.llama_encode, prompt)
  tokens, logits = [lib.llama_model_decoder_start_token(model)], []
  for _ in range(steps):
    run(lib.llama_decode, tokens[-1:])
    logits.append(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocab,)).tolist())
    tokens.append(int(np.argmax(logits[-1])))
  return {"tokens": tokens[1:], "logits": logits}


def main():
  import xllamacpp

  request = json.load(sys.stdin)
  if request["posts"][0][0] == "encode":
    library = xllamacpp.xllamacpp.__file__
    answers = [encode(library, request["file"], **body) for _, body in request["posts"]]
    Path(sys.argv[1]).write_text(json.dumps(answers))
    os._exit(0)
  params = xllamacpp.CommonParams()
  params.model.path = request["file"]
  params.n_ctx, params.n_batch, params.n_parallel, params.warmup = 128, 128, 1, False
  params.cpuparams.n_threads = 1
  params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  if request["embedding"]:
    params.embedding, params.n_ubatch = True, 128
    if request["embedding"] != "pooled":
      kind = "RANK" if request["embedding"] == "rank" else "NONE"
      params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{kind}")
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

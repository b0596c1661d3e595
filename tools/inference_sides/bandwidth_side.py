"""Memory's side of `bench_inference.py`: how fast all cores read 256 MiB that no cache holds, as STREAM does."""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

SOURCE = """
#include <stdint.h>
#include <stddef.h>
uint64_t sum(const uint64_t* p, size_t n) {
  uint64_t s[32] = {0};
  for (size_t i = 0; i < n; i += 32)
    for (int j = 0; j < 32; j++) s[j] ^= p[i + j];
  uint64_t all = 0;
  for (int j = 0; j < 32; j++) all ^= s[j];
  return all;
}
"""
with tempfile.TemporaryDirectory() as folder:
  library = f"{folder}/sum.so"
  command = [os.environ.get("CC", "gcc"), "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "-", "-o", library]
  subprocess.run(command, input=SOURCE, text=True, check=True)
  read = ctypes.CDLL(library).sum
read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
words = np.ones(2**25, np.uint64)
cores = os.cpu_count() or 1
part = len(words) // cores // 32 * 32

print(json.dumps("STREAM-like read"), flush=True)
for _ in sys.stdin:
  times = []
  for _ in range(9):
    threads = [threading.Thread(target=read, args=(words[i * part :].ctypes.data, part)) for i in range(cores)]
    start = time.perf_counter()
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    times.append((time.perf_counter() - start) / (8 * part * cores) * 1e9)  # of 10^9 bytes
  print(json.dumps({"times": [float(np.median(times)), min(times)], "losses": []}), flush=True)

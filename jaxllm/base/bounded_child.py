"""The process in which `jaxllm.base.bounded` runs programs of strangers; started by its path, so it imports no jaxllm.

A request is a JSON object on a line, [program file, lengths of the texts], and then the texts; the answer is alike:
["done", [length]], or the name of what went wrong and a message, and a text.
"""

import importlib.util
import json
import resource
import signal
import sys
from collections.abc import Callable

SECONDS, MEMORY, OUTPUT = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


def _loaded(programs: dict[str, Callable[..., str]], path: str) -> Callable[..., str]:
  if path not in programs:
    spec = importlib.util.spec_from_file_location("program", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    programs[path] = module.run
  return programs[path]


def _answer(run: Callable[..., str], texts: list[str]) -> tuple[str, str]:
  try:
    text = run(*texts)
    return ("done", text) if len(text) <= OUTPUT else ("limit", f"it writes more than {OUTPUT >> 20} MiB")
  except MemoryError:
    return "limit", f"it needs more than {MEMORY >> 20} MiB of memory"
  except RecursionError:
    return "limit", "it is nested too deeply"
  except Exception as error:  # a stranger's program may fail in any way
    try:
      return "failed", f"{type(error).__name__}: {error}"[:2000]
    except Exception:
      return "failed", type(error).__name__


def main() -> None:
  answers, sys.stdout = sys.stdout.buffer, sys.stderr
  for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
  programs: dict[str, Callable[..., str]] = {}
  requests = sys.stdin.buffer
  while line := requests.readline():
    path, lengths = json.loads(line)
    texts = [requests.read(length).decode("utf-8", "surrogatepass") for length in lengths]
    run = _loaded(programs, path)
    # Of the processor's time, counted by the kernel, which ends the process: nothing in it could be relied on.
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    kind, text = _answer(run, texts)
    data = text.encode("utf-8", "surrogatepass")
    signal.setitimer(signal.ITIMER_PROF, 0)
    answers.write(json.dumps([kind, len(data)]).encode() + b"\n" + data)
    answers.flush()
    if kind == "limit":
      return  # what it took may still be held


if __name__ == "__main__":
  main()

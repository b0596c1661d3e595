"""The child of tools/bench_kernels.py: times one side of one case, or checks one kernel, on the device at hand."""

import importlib.util
import itertools
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import isolate

from jaxllm.base.chips import chip_of
from jaxllm.base.errors import UserError
from jaxllm.kernels.backends import BACKENDS, TARGETS

REPEATS = 2
CACHES = 256 << 20  # several times the largest cache of any chip: fewer bytes than this are not read twice in a row
KEPT = 8 << 30  # bytes of results that wait for the clock at once


class Random:
  """`np.random.Generator` whose many normal numbers are made on the device: the host would take minutes."""

  def __init__(self, seed: int):
    self.key, self.host = jax.random.key(seed), np.random.default_rng(seed)

  def standard_normal(self, shape, dtype=np.float32):
    self.key, key = jax.random.split(self.key)
    return jax.random.normal(key, shape, dtype)

  def __getattr__(self, name):
    return getattr(self.host, name)


def inputs_of(case, seed: int = 0) -> tuple:
  """A case's inputs, random: zeros would run faster than real data."""
  rng = Random(seed)
  if case.make is not None:
    return case.make(rng)
  return jax.tree.map(lambda s: rng.standard_normal(s.shape, s.dtype), case.inputs)


# Others that know some chips only
FAMILIES = {
  "jax.nn cudnn": ("hopper", "gpu"),
  "jax FA3": ("hopper",),
  "jax splash": ("tpu",),
  "jax megablox": ("tpu",),
}


def sides(case, target: str) -> list[str]:
  """Who computes a case on this chip: our backends of its table, the others, torch."""
  table = BACKENDS.get(case.op.removesuffix(" backward"))
  ours = [name for name in (table[TARGETS[target]] if table else case.backends)]
  others = [name for name in case.others if TARGETS[target] in FAMILIES.get(name, (TARGETS[target],))]
  torch = ["torch"] if case.torch is not None and importlib.util.find_spec("torch") else []
  return [f"jaxllm {name}" for name in ours] + others + torch


def function_of(case, side: str, target: str):
  """The jax function of a side."""
  return case.others[side] if side in case.others else case.ours(side.removeprefix("jaxllm "), target)


# ---------------------------------------------------------------- time


class Turns:
  """A jitted function that takes the next of several sets of inputs at every call, so that caches do not help it.

  It has what jax's profiler takes for `jax.jit`'s result.
  """

  def __init__(self, run, sets):
    self.run, self.sets, self.turn = run, sets, itertools.cycle(sets)

  def __call__(self):
    return self.run(*next(self.turn))

  def trace(self):
    return self.run.trace(*self.sets[0])

  def lower(self):
    return self.run.lower(*self.sets[0])


def timings(run, sets, calls: int) -> tuple[list[float], str]:
  """(milliseconds of each of `calls` calls, how they were taken); the function has run before."""
  turns = Turns(run, sets)
  if jax.default_backend() != "gpu":
    times = []
    for _ in range(calls):
      start = time.perf_counter()
      jax.block_until_ready(turns())
      times.append((time.perf_counter() - start) * 1e3)
    return times, "clock"
  try:
    return by_cupti(turns, calls)
  except Exception as error:  # no CUPTI here, or another program has it
    return [back_to_back(turns, calls)] * calls, f"clock, back to back, because of CUPTI: {_line(error)}"


def by_cupti(turns, calls: int) -> tuple[list[float], str]:
  """Own time of the kernels of each call, summed; copies and gaps between kernels are not in it."""
  from jax.experimental.mosaic.gpu import profiler

  size = sum(x.nbytes for x in jax.tree.leaves(turns()))
  at_once, times = max(1, min(calls, KEPT // max(size, 1))), []
  how = "CUPTI"
  while len(times) < calls:
    try:
      _, found = profiler.measure(turns, iterations=at_once)()
    except RuntimeError as error:  # calls whose kernels differ in number or order can only be told apart one by one
      if at_once == 1 or "kernel" not in str(error).lower():
        raise
      at_once, how = 1, "CUPTI, call by call"
      continue
    if found is None:
      raise RuntimeError("it saw no kernel")
    times += [found] if isinstance(found, float) else list(found)
  return times[:calls], how


def back_to_back(turns, calls: int) -> float:
  """Milliseconds of a call by the clock, when calls queue up one behind the other."""
  size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(turns())))
  at_once, seconds = max(1, min(calls, KEPT // max(size, 1))), []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready([turns() for _ in range(at_once)])
    seconds.append((time.perf_counter() - start) / at_once)
  return min(seconds) * 1e3


def ceilings(calls: int) -> dict[str, float]:
  """What this device does at best, measured now: FLOP/s of a square product, bytes/s of a copy."""
  small = jax.default_backend() == "cpu"
  found = {}
  n, dtypes = (2048, ("float32", "bfloat16")) if small else (8192, ("bfloat16",))
  for dtype in dtypes:
    a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
    run = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(run(a, b))
    found[f"{dtype} FLOP/s"] = 2 * n**3 / (statistics.median(timings(run, [(a, b)], calls)[0]) * 1e-3)
  x = jnp.arange((64 if small else 512) << 20, dtype=jnp.uint32).astype(jnp.float32)
  run = jax.jit(lambda x: -x, donate_argnums=0)  # in place, so that a CPU does not measure its page faults
  x, times = jax.block_until_ready(run(x)), []
  for _ in range(calls):
    start = time.perf_counter()
    x = jax.block_until_ready(run(x))
    times.append((time.perf_counter() - start) * 1e3)
  if not small:  # own time of the copy alone
    plain = jax.jit(lambda x: -x)
    times, _ = timings(plain, [(jax.block_until_ready(plain(x)),)], calls)
  found["bytes/s"] = 2 * x.nbytes / (statistics.median(times) * 1e-3)
  return found


# ---------------------------------------------------------------- errors


def relative_error(got, want) -> float:
  """Root mean square of the error over that of the truth, of the worst array."""

  def of(a, b):
    a, b = (jnp.asarray(x, jnp.float32) if isinstance(x, jax.Array) else np.asarray(x, np.float64) for x in (a, b))
    return float(((a - b) ** 2).mean() ** 0.5 / ((b**2).mean() ** 0.5 + 1e-30))

  return max(of(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


class Truth:
  """What a case's result should be, kept for the sides of one case."""

  def __init__(self):
    self.case, self.target, self.value = None, None, None

  def errors(self, case, inputs, result, target) -> dict[str, float]:
    """Against float64 on the part that the case's oracle computes, and against our plain form in float32 on all."""
    found = {}
    if case.oracle is not None and (pair := case.oracle(inputs, result)) is not None:
      found["float64, part"] = relative_error(*(np.asarray(x, np.float64) for x in pair))
    if self.case != (case.op, case.name):
      self.value, self.case = None, (case.op, case.name)
      wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in (jnp.bfloat16, jnp.float16) else x, inputs)
      try:
        with jax.default_matmul_precision("highest"):
          self.value = jax.block_until_ready(jax.jit(case.ours("xla", target))(*wide))
      except TypeError:  # a cotangent that has to have the result's own dtype
        pass
    if self.value is not None:
      found["float32"] = relative_error(result, self.value)
    return found


# ---------------------------------------------------------------- a side


def torch_side(case, calls: int, device: str) -> dict:
  """Times of the torch function on the same numbers."""
  import torch

  sets = [jax.tree.map(lambda x: _to_torch(x, device), inputs_of(case, seed)) for seed in range(copies(case))]
  turn = itertools.cycle(sets)

  def once():
    if device == "cpu":
      start = time.perf_counter()
      case.torch(*next(turn))
      return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    case.torch(*next(turn))
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)

  with torch.no_grad():
    for _ in range(3):
      once()
    medians = [statistics.median(once() for _ in range(calls)) for _ in range(REPEATS)]
  how = "clock" if device == "cpu" else "CUDA events"
  return {"ms": medians, "timed by": how, "version": torch.__version__}


def _to_torch(x, device):
  import torch

  if x.dtype == jnp.bfloat16:
    return torch.from_numpy(np.array(x.astype(jnp.float32))).to(device, torch.bfloat16)
  return torch.from_numpy(np.array(x)).to(device)


def copies(case) -> int:
  """How many sets of inputs are needed so that none is in a cache when its turn comes."""
  return int(min(16, max(1, -(-CACHES // max(1, int(case.bytes))))))


def time_side(case, side: str, target: str, calls: int, truth: Truth) -> dict:
  """The row of one side: what it took, how far off it is, what memory it needs."""
  if side == "torch":
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    return torch_side(case, calls, device)
  sets = [inputs_of(case, seed) for seed in range(copies(case))]
  run = jax.jit(function_of(case, side, target))
  start = time.perf_counter()
  memory = run.lower(*sets[0]).compile().memory_analysis()
  row = {"compile s": time.perf_counter() - start, "temp bytes": getattr(memory, "temp_size_in_bytes", None)}
  result = jax.block_until_ready(run(*sets[0]))
  row["errors"] = truth.errors(case, sets[0], result, target)
  if side.startswith("jaxllm"):
    row["same again"] = all(same(run(*sets[0]), result) for _ in range(3))
  del result
  medians = []
  for _ in range(REPEATS):
    times, row["timed by"] = timings(run, sets, calls)
    medians.append(statistics.median(times))
  row["ms"] = medians
  if jax.default_backend() == "gpu":  # with the gaps between kernels, and whatever dispatching costs
    row["clock ms"] = back_to_back(Turns(run, sets), calls)
  return row


def same(a, b) -> bool:
  """Bit by bit, NaN equal to NaN."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return all(bool(jnp.array_equal(x, y, equal_nan=jnp.issubdtype(x.dtype, jnp.floating))) for x, y in pairs)


# ---------------------------------------------------------------- the child


REFUSALS = (UserError, ImportError, NotImplementedError)


def _line(error) -> str:
  return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def device_facts() -> dict:
  """What a figure depends on beside the code."""
  device = jax.devices()[0]
  found = {}
  for name in ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "libtpu", "torch", "tokamax"):
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return {
    "device": device.device_kind,
    "target": chip_of(device.platform, device.device_kind).name,
    "cores": os.cpu_count(),
    "processor": _processor(),
    "versions": found | {"python": platform.python_version()},
  }


def _processor() -> str:
  try:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  facts = dict([part.strip() for part in line.split(":", 1)] for line in lines if ":" in line)
  return f"{facts.get('model name', '?')}, family {facts.get('cpu family', '?')}"


def healthy() -> bool:
  """Whether the device still computes: after an illegal access every later call fails."""
  try:
    return int(jnp.arange(1000).sum()) == 499500
  except Exception:
    return False


def main():
  table_file, family_calls = sys.argv[1], int(sys.argv[2])
  table = load(table_file)
  facts = device_facts()
  target = facts["target"]
  by_name = {(case.op, case.name): case for case in table.cases(TARGETS[target])}
  checks = {(check.op, check.name): check for check in table.checks(target)}
  truth = Truth()

  def handle(job: dict) -> dict:
    try:
      if job["do"] == "facts":
        return facts
      if job["do"] == "ceilings":
        return ceilings(family_calls)
      if job["do"] == "check":
        return checks[job["op"], job["name"]].outcome(job["backend"], target)
      return time_side(by_name[job["op"], job["case"]], job["side"], target, family_calls, truth)
    except REFUSALS as error:
      return {"refused": _line(error)}
    except Exception as error:
      failed = {"failed": f"{type(error).__name__}: {_line(error)}"}
      return failed | ({} if healthy() else {"poisoned": True})

  isolate.serve(handle)


def load(path: str):
  """The module at a path, which has `cases(family)` and may have `checks(target)`."""
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  spec.loader.exec_module(module)
  return module


if __name__ == "__main__":
  main()

"""Checkpoints of a job of two processes: what one host sees alone decides nothing."""

import hashlib
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxllm.base.errors import CheckpointError
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.storage.config import CheckpointConfig

START = """
  import os, random, sys, time
  from pathlib import Path
  import jax.numpy as jnp, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from jaxllm.base.errors import CheckpointError, ConfigError, UserError
  from jaxllm.storage.checkpoints import Checkpoints
  from jaxllm.storage.config import CheckpointConfig
  directory = Path(sys.argv[1])
  mesh = jax.make_mesh((2,), ("fsdp",), (AxisType.Auto,))
  make = jax.jit(lambda n: {"params": {"w": jnp.arange(400_000.0) + n}, "step": n},
                 out_shardings={"params": {"w": NamedSharding(mesh, P("fsdp"))}, "step": NamedSharding(mesh, P())})
  config = CheckpointConfig(keep_last=2, keep_best=0)
"""


def test_slow_renames_and_looks_at_different_moments_change_nothing(two_processes, tmp_path):
  code = """
  if index == 0:  # process 0 commits late, so that hosts which look at the disk see different steps
    rename, replace = os.rename, os.replace
    os.rename = lambda *a, **k: (time.sleep(0.7), rename(*a, **k))[1]
    os.replace = lambda *a, **k: (time.sleep(0.7), replace(*a, **k))[1]
  moments, seen = random.Random(index), []
  with Checkpoints(directory, config) as checkpoints:
    for n in range(1, 4):
      for _ in range(2):  # the periodic save of a step, and the final one of the same
        time.sleep(moments.uniform(0, 0.3) if index == 0 else moments.uniform(0, 1.5))
        seen.append(checkpoints.latest_step())
        if checkpoints.latest_step() != n:
          checkpoints.save(n, make(jnp.int32(n)), {"n": n})
  seen.append(checkpoints.steps())
  with Checkpoints(directory, config) as checkpoints:
    seen += [checkpoints.latest_step(), checkpoints.restore(make(jnp.int32(0))).step]
  print("seen", seen)
  """
  for output in two_processes(START + code, tmp_path):
    assert "seen [None, 1, 1, 2, 2, 3, [2, 3], 3, 3]" in output


def test_one_host_without_the_directory_sees_what_the_first_tells(two_processes, tmp_path):
  code = """
  if index == 1:  # a network file system that shows nothing yet
    import jaxllm.storage.reading as reading, jaxllm.storage.checkpoints as module
    reading.committed_steps = module.committed_steps = lambda directory: []
  with Checkpoints(directory, config) as checkpoints:
    print("found", checkpoints.latest_step(), checkpoints.steps(), checkpoints.restore(make(jnp.int32(0)))[::2])
  """
  with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
    state = {"params": {"w": jnp.arange(400_000.0) + 7}, "step": jnp.int32(7)}
    checkpoints.save(7, state, {"n": 7})
  for output in two_processes(START + code, tmp_path):
    assert "found 7 [7] (7, {'n': 7})" in output


FAILURES = {
  "before": """
  def full(path, content):
    raise OSError(28, "No space left on device")
  import jaxllm.storage.checkpoints as module
  def fail():
    module.write_atomically, fail.before = full, module.write_atomically
  def mend():
    module.write_atomically = fail.before
  bad = 0
  """,
  "arrays": """
  import resource
  def fail():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
  def mend():
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
  bad = 1
  """,
  "digests": """
  import jaxllm.storage.manifest as manifest
  def broken(directory, names):
    raise OSError(5, "Input/output error")
  def fail():
    manifest.digests, fail.before = broken, manifest.digests
  def mend():
    manifest.digests = fail.before
  bad = 1
  """,
  "manifest": """
  import jaxllm.base.digests as manifest
  def full(path, content):
    raise OSError(28, "No space left on device")
  def fail():
    manifest.write_atomically, fail.before = full, manifest.write_atomically
  def mend():
    manifest.write_atomically = fail.before
  bad = 0
  """,
}


@pytest.mark.parametrize(
  "moment, reason",
  [
    ("before", "the disk is full; free some space, or choose another disk"),
    ("arrays", "the file grew too large for its file system or ulimit -f; raise the limit, or choose another disk"),
    ("digests", "the disk or network failed (I/O error); look at the system's log (dmesg), then start again"),
    ("manifest", "the disk is full; free some space, or choose another disk"),
  ],
)
def test_a_save_that_fails_on_one_host_fails_on_both_and_the_next_succeeds(two_processes, tmp_path, moment, reason):
  code = """
  began = time.monotonic()
  with Checkpoints(directory, config) as checkpoints:
    checkpoints.save(1, make(jnp.int32(1)))
    checkpoints.wait()
    if index == bad:
      fail()
    try:
      checkpoints.save(2, make(jnp.int32(2)))
      checkpoints.wait()
    except CheckpointError as error:
      print("error:", error)
    if index == bad:
      mend()
    print("left", checkpoints.latest_step(), checkpoints.steps())
    checkpoints.save(3, make(jnp.int32(3)))
  print("then", checkpoints.steps(), time.monotonic() - began < 30, flush=True)
  if index == 0:  # the other one's questions go through this process
    time.sleep(1)
  os._exit(0)  # a thread of Orbax waits for its barrier, for minutes
  """
  for output in two_processes(START + FAILURES[moment] + code, tmp_path):
    assert f"cannot save step 2 under {tmp_path}: {reason}; the last good checkpoint is step 1\n" in output
    assert "left 1 [1]" in output and "then [1, 3] True" in output
  assert sorted(place.name for place in tmp_path.iterdir()) == ["1", "3"]


def test_each_host_hashes_what_it_wrote(two_processes, tmp_path):
  code = """
  import jaxllm.base.digests as base
  hashed, real = [], base._sha256
  base._sha256 = lambda path: (hashed.append(str(path)), real(path))[1]
  with Checkpoints(directory, config) as checkpoints:
    checkpoints.save(5, make(jnp.int32(5)), {"n": 5})
  print("HASHED " + " ".join(hashed))
  """
  outputs = two_processes(START + code, tmp_path)
  hashed = [next(line for line in out.splitlines() if line.startswith("HASHED ")).split()[1:] for out in outputs]
  place = tmp_path / "5"
  files = {str(path) for path in place.rglob("*") if path.is_file() and path.name != "manifest.json"}
  assert set(hashed[0]) | set(hashed[1]) == files and len(hashed[0]) + len(hashed[1]) == len(files), "each once"
  big = {path for path in files if (place / path).stat().st_size > 100_000}
  assert {name for name in big if "process_1" in name} == big & set(hashed[1]) != set()
  assert {name for name in big if "process_0" in name} == big & set(hashed[0]) != set()
  manifest = json.loads((place / "manifest.json").read_text())
  assert manifest["files"] == {
    str(path.relative_to(place)): {
      "bytes": path.stat().st_size,
      "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    for path in sorted(place.rglob("*"))
    if str(path) in files
  }
  damaged = next(iter(big & set(hashed[1])))
  content = bytearray(Path(damaged).read_bytes())
  content[len(content) // 2] ^= 1
  Path(damaged).write_bytes(content)
  with (
    pytest.raises(CheckpointError, match=f"step 5 is damaged: {damaged} has changed"),
    Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
  ):
    checkpoints.restore({"params": {"w": jnp.zeros(400_000)}, "step": jnp.int32(0)}, step=5)

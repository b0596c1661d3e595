"""Compiled programs are found again by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from jaxllm.inference.engine import kept
from jaxllm.kernels import cpu_library

PROGRAM = """
import sys
import jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(jnp.zeros(3))
from jaxllm.inference.engine.kept import keep_programs
keep_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
found = []
from jax._src import monitoring
monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: jnp.sin(x) @ x.T)(jnp.ones((4, 3)))
print(sum("cache_hits" in name for name in found), jax.config.jax_compilation_cache_dir)
"""


def run(**environment):
  names = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAXLLM_CACHE_DIR")
  clean = {name: value for name, value in os.environ.items() if name not in names}
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  hits, folder = done.stdout.split()[-2:]
  return int(hits), folder, done.stderr


def test_the_second_process_compiles_nothing(tmp_path):
  hits, folder, _ = run(JAXLLM_CACHE_DIR=str(tmp_path))
  assert hits == 0 and Path(folder).parent == tmp_path and list(Path(folder).iterdir())
  hits, again, _ = run(JAXLLM_CACHE_DIR=str(tmp_path))
  assert hits > 0 and again == folder


def test_what_jax_was_told_stays(tmp_path, monkeypatch):
  mine = str(tmp_path / "mine")
  assert run(JAX_COMPILATION_CACHE_DIR=mine, JAXLLM_CACHE_DIR=str(tmp_path / "ours"))[1] == mine
  assert run(JAX_ENABLE_COMPILATION_CACHE="false", JAXLLM_CACHE_DIR=str(tmp_path / "ours"))[1] == "None"
  assert not (tmp_path / "ours").exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path, caplog, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("JAXLLM_CACHE_DIR", str(tmp_path / "file"))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  cpu_library.cache_dir.cache_clear()  # an earlier test may have asked
  try:
    kept.keep_programs()
    place = jax.config.jax_compilation_cache_dir
    assert "/jaxllm-" in place and "is no folder" in caplog.text, "a folder of this user's takes its place"
  finally:
    cpu_library.cache_dir.cache_clear()
    jax.config.update("jax_compilation_cache_dir", before)

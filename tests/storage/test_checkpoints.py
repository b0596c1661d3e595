"""Checkpoints: bit-exact round trips, damage, full disks, kills, other meshes, several processes."""

import dataclasses
import errno
import functools
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.os_errors import KNOWN
from jaxllm.base.settings import from_mapping
from jaxllm.storage.checkpoints import Checkpoints, steps_to_keep
from jaxllm.storage.config import CheckpointConfig
from jaxllm.storage.reading import committed_steps, restore_params

ALL = CheckpointConfig(keep_last=100)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "scale"], meta_fields=["bits"])
@dataclasses.dataclass(frozen=True)
class Weight:
  base: jax.Array
  scale: jax.Array
  bits: int = 8


def random_params(key):
  keys = iter(jax.random.split(key, 8))
  values = jax.random.normal(next(keys), (4, 6, 8))
  return {
    "blocks": {
      "query": values,
      "key": values.astype(jnp.bfloat16),
      "value": values.astype(jnp.float16).at[0, 0, 0].set(jnp.nan),
      "quantized": Weight(
        jax.random.randint(next(keys), (6, 8), -128, 127, jnp.int8), jax.random.normal(next(keys), (8,))
      ),
    },
    "four_bits": jnp.arange(-8, 8, dtype=jnp.int4),
    "eight_bit_floats": jnp.linspace(-2, 2, 7).astype(jnp.float8_e4m3fn),
    "mask": values[0] > 0,
    "none": None,
  }


def random_state(seed=0):
  params = random_params(jax.random.key(seed))
  trained = {"query": params["blocks"]["query"], "key": params["blocks"]["key"]}
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  return {
    "step": jnp.int32(seed),
    "params": params,
    "opt_state": optimizer.init(trained),
    "key": jax.random.split(jax.random.key(seed + 1), 3),
    "old_key": jax.random.key_data(jax.random.key(7, impl="rbg")),
    "empty": jnp.zeros((0, 3), jnp.bfloat16),
    "host": np.arange(5, dtype=np.uint32),
    "accumulator": (jnp.float32(1.5), [jnp.full((2,), -0.0)]),
  }


def abstract(tree):
  def one(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))

  return jax.tree.map(one, tree)


def raw(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  leaf = np.asarray(leaf)
  return leaf.astype(np.int8) if leaf.dtype == jnp.int4 else leaf


def assert_identical(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape, path
    assert raw(x).tobytes() == raw(y).tobytes(), path  # bytes: NaNs and the sign of zero count


def small_state(step, size=256):
  return {"step": jnp.int32(step), "params": {"w": jax.random.normal(jax.random.key(step), (size,))}}


def data_files(place):
  return sorted(p for p in (place / "state").rglob("*") if p.is_file() and p.parent.name == "d")


@pytest.fixture
def warnings(monkeypatch):
  lines = []
  monkeypatch.setattr(logging.getLogger("jaxllm"), "warning", lambda text, *args: lines.append(text % args))
  return lines


@pytest.mark.parametrize("asynchronous", [True, False])
def test_every_leaf_comes_back_bit_for_bit(tmp_path, asynchronous):
  state = random_state(3)
  config = dataclasses.replace(ALL, asynchronous=asynchronous)
  with Checkpoints(tmp_path / "c", config) as checkpoints:
    checkpoints.save(3, state, {"next": [1, {"epoch": 2}]}, {"eval/loss": 2.5})
    if not asynchronous:
      assert checkpoints.latest_step() == 3
  with Checkpoints(tmp_path / "c", config) as checkpoints:
    step, restored, data = checkpoints.restore(abstract(state))
  assert step == 3 and data == {"next": [1, {"epoch": 2}]}
  assert_identical(state, restored)
  assert jax.random.key_impl(restored["key"]) == jax.random.key_impl(state["key"])
  jax.random.normal(restored["key"][0])


def test_arrays_may_be_donated_while_they_are_being_written(tmp_path):
  step_function = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {"params": {str(i): jax.random.normal(jax.random.key(i), (512, 512)) for i in range(8)}}
  saved = {}
  with Checkpoints(tmp_path, ALL) as checkpoints:
    for step in range(4):
      saved[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
      checkpoints.save(step, state)
      for _ in range(20):
        state = step_function(state)
    checkpoints.wait()
    for step in range(4):
      assert_identical(saved[step], checkpoints.restore(abstract(state), step).state)


def test_no_requested_save_is_skipped(tmp_path):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    for step in range(6):
      checkpoints.save(step, small_state(step))
  assert committed_steps(tmp_path) == list(range(6))


@pytest.mark.parametrize(
  "config, kept",
  [
    (CheckpointConfig(keep_last=2, keep_best=0), {80, 90}),
    (CheckpointConfig(keep_last=1, keep_best=2), {20, 50, 90}),
    (CheckpointConfig(keep_last=0, keep_best=0), {90}),
    (CheckpointConfig(keep_last=1, keep_best=0, keep_every=40), {40, 80, 90}),
  ],
)
def test_retention_rules(config, kept):
  scores = {10: 9.0, 20: 1.0, 30: float("nan"), 40: None, 50: 2.0, 60: 3.0, 70: 3.0, 80: 4.0, 90: None}
  assert steps_to_keep(scores, 90, config) == kept
  assert steps_to_keep({**scores, 200: 0.0}, 90, config) == kept, "later steps are an abandoned course"


scores_of_steps = st.dictionaries(
  st.integers(0, 30), st.none() | st.sampled_from([0.5, 1.0, 2.0, float("nan"), float("inf")]), min_size=1, max_size=12
)


@given(
  scores_of_steps,
  st.integers(0, 15),
  st.integers(0, 15),
  st.none() | st.integers(0, 6),
  st.data(),
)
def test_retention_is_what_its_words_say(scores, keep_last, keep_best, keep_every, data):
  newest = data.draw(st.sampled_from(sorted(scores)))
  config = CheckpointConfig(keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
  past = [step for step in scores if step <= newest]

  def finite(step):
    return scores[step] is not None and np.isfinite(scores[step])

  def better(a, b):
    return scores[a] < scores[b] or (scores[a] == scores[b] and a > b)

  def stays(step):
    among_last = sum(other > step for other in past) < keep_last
    among_best = finite(step) and sum(finite(other) and better(other, step) for other in past) < keep_best
    return step == newest or among_last or among_best or bool(keep_every) and step % keep_every == 0

  assert steps_to_keep(scores, newest, config) == {step for step in past if stays(step)}


@pytest.mark.parametrize("key", ["every", "keep_last", "keep_best", "keep_every"])
def test_negative_settings_are_refused(key):
  with pytest.raises(ConfigError, match=f"^checkpoint.{key} is -1; it must not be negative$"):
    from_mapping(CheckpointConfig, {key: -1}, "checkpoint")


def test_only_a_score_of_its_own_makes_a_step_the_best(tmp_path):
  config = CheckpointConfig(keep_last=1, keep_best=1)
  scores = {1: {"eval/loss": 3.0}, 2: {"eval/loss": 2.0}, 3: {}, 4: None, 5: {"eval/loss": 2.0}, 6: {"loss": 1.0}}
  kept = {1: [1], 2: [2], 3: [2, 3], 4: [2, 4], 5: [5], 6: [5, 6]}  # of equal scores the newer
  with Checkpoints(tmp_path, config) as checkpoints:
    for step, metrics in scores.items():
      checkpoints.save(step, small_state(step), metrics=metrics)
      checkpoints.wait()
      assert checkpoints.steps() == committed_steps(tmp_path) == kept[step]


def test_a_step_that_was_damaged_and_passed_over_is_saved_again(tmp_path):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, small_state(step, 4096))
      assert checkpoints.latest_step() == step, "in flight it counts: it need not be saved again"
  max(data_files(tmp_path / "20"), key=lambda p: p.stat().st_size).write_bytes(b"")
  with Checkpoints(tmp_path, ALL) as checkpoints:
    assert checkpoints.latest_step() == 20
    checkpoints.restore(small_state(0, 4096))
    assert checkpoints.latest_step() == 10, "the run stands at step 10, and step 20 is to come"
    checkpoints.save(20, small_state(21, 4096))
  with Checkpoints(tmp_path, ALL) as checkpoints:
    assert_identical(checkpoints.restore(small_state(0, 4096)).state, small_state(21, 4096))


def test_what_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch, warnings):
  config = CheckpointConfig(keep_last=1, keep_best=0)
  with Checkpoints(tmp_path, config) as checkpoints:
    checkpoints.save(1, small_state(1))
    checkpoints.wait()

    def refuse(path, **options):
      raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.save(2, small_state(2))
    checkpoints.wait()
    monkeypatch.undo()
  assert committed_steps(tmp_path)[-1] == 2
  assert any(f"cannot remove {tmp_path}" in line for line in warnings)


def test_retention_on_disk(tmp_path):
  config = CheckpointConfig(keep_last=2, keep_best=1, keep_every=4)
  losses = [5.0, 1.0, 4.0, 3.0, 6.0, 7.0, float("nan"), 8.0]
  with Checkpoints(tmp_path, config) as checkpoints:
    for step, loss in enumerate(losses, 1):
      checkpoints.save(step, small_state(step), metrics={"eval/loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 7, 8]
    checkpoints.restore(small_state(0), step=4)
    checkpoints.save(6, small_state(60))  # another course from step 4: 7 and 8 are not its past
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
    assert_identical(checkpoints.restore(small_state(0)).state, small_state(60))


def test_saving_a_step_again_replaces_it(tmp_path):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(5, small_state(1))
    checkpoints.save(5, small_state(2))
    assert_identical(checkpoints.restore(small_state(0)).state, small_state(2))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["5"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "data"])
def test_a_damaged_step_falls_back_to_the_one_before(tmp_path, warnings, damage):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, small_state(step, 4096), {"at": step})
  file = max(data_files(tmp_path / "20"), key=lambda p: p.stat().st_size)
  if damage == "manifest":
    file = tmp_path / "20" / "manifest.json"
  if damage == "data":
    file = tmp_path / "20" / "data.json"
  content = file.read_bytes()
  if damage == "remove":
    file.unlink()
  elif damage == "truncate":
    file.write_bytes(content[: len(content) // 2])
  else:
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
  with Checkpoints(tmp_path, ALL) as checkpoints:
    step, state, data = checkpoints.restore(small_state(0, 4096))
    assert step == 10 and data == {"at": 10}
    assert_identical(state, small_state(10, 4096))
    assert len(warnings) == 1 and str(file) in warnings[0] and "step 10" in warnings[0]
    with pytest.raises(CheckpointError, match=f"step 20 is damaged: {file}"):
      checkpoints.restore(small_state(0, 4096), step=20)
    shutil.rmtree(tmp_path / "10")
    with pytest.raises(CheckpointError, match="no good checkpoint is left"):
      checkpoints.restore(small_state(0, 4096))


def test_a_step_under_another_name_is_refused(tmp_path, warnings):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(10, small_state(10))
  shutil.copytree(tmp_path / "10", tmp_path / "20")
  with Checkpoints(tmp_path, ALL) as checkpoints:
    assert checkpoints.restore(small_state(0)).step == 10
    assert len(warnings) == 1 and f"{tmp_path / '20'} is a copy of step 10 under another name" in warnings[0]
    with pytest.raises(CheckpointError, match="a copy of step 10"):
      checkpoints.restore(small_state(0), step=20)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO, errno.ESTALE])
def test_what_cannot_be_read_is_not_called_damaged_and_not_passed_over(tmp_path, warnings, monkeypatch, number):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    for step in (10, 20):
      checkpoints.save(step, small_state(step))

  def refused(path):
    raise OSError(number, os.strerror(number), str(path))

  monkeypatch.setattr("jaxllm.base.digests._sha256", refused)
  with Checkpoints(tmp_path, ALL) as checkpoints, pytest.raises(CheckpointError) as error:
    checkpoints.restore(small_state(0))
  said = str(error.value)
  assert said.startswith(f"cannot read {tmp_path / '20'}") and "damaged" not in said and "step 20" in said
  assert KNOWN[number][0] in said and KNOWN[number][1] in said and not warnings


def test_damage_to_the_optimizer_does_not_stop_inference(tmp_path):
  moments = jax.random.normal(jax.random.key(0), (3000,))
  state = {"params": {"w": jnp.ones(3000)}, "opt_state": {"mu": moments}}
  with Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(1, state)
  for file in data_files(tmp_path / "1"):
    if "opt_state" in str(file):
      file.write_bytes(b"")
  step, params = restore_params(tmp_path)
  assert step == 1
  assert_identical(params, state["params"])
  with pytest.raises(CheckpointError, match="has 0 bytes instead of"):
    restore_params(tmp_path, part="opt_state")


def test_params_alone_from_a_run_directory(tmp_path):
  state = random_state(1)
  with Checkpoints(tmp_path / "checkpoints", ALL) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.save(2, random_state(2))
  step, params = restore_params(tmp_path, abstract(state["params"]), step=1)
  assert step == 1
  assert_identical(params, state["params"])
  step, plain = restore_params(tmp_path)
  expected = random_state(2)["params"]
  assert step == 2
  np.testing.assert_array_equal(plain["blocks"]["quantized"]["base"], expected["blocks"]["quantized"].base)
  bf16 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), {"w": jnp.ones(256)})
  with Checkpoints(tmp_path / "other", ALL) as checkpoints:
    checkpoints.save(1, small_state(1))
  _, cast = restore_params(tmp_path / "other", bf16)
  assert_identical(cast, {"w": small_state(1)["params"]["w"].astype(jnp.bfloat16)})
  with pytest.raises(CheckpointError, match="no 'ema'; it has params, step"):
    restore_params(tmp_path / "other", part="ema")


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: s["params"].update(w=jnp.ones(257)), r"params/w has shape \[256\] .* step 3 but \[257\] here"),
    (lambda s: s["params"].update(w=jnp.ones(256, jnp.bfloat16)), "params/w has dtype float32 .* bfloat16"),
    (lambda s: s["params"].update(v=jnp.ones(2)), "step 3 has no params/v"),
    (lambda s: s.pop("step"), "step 3 has step, which this model"),
  ],
)
def test_another_model_is_named_by_its_first_parameter_that_differs(tmp_path, warnings, change, message):
  state = small_state(3)
  with Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(1, state)
    checkpoints.save(3, state)
    change(state)
    with pytest.raises(CheckpointError, match=message):
      checkpoints.restore(abstract(state))
  assert not warnings, "a wrong model is no damage: nothing to fall back from"


def test_missing_steps_are_named(tmp_path):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    assert checkpoints.latest_step() is None
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
      checkpoints.restore(small_state(0))
    checkpoints.save(4, small_state(4))
    with pytest.raises(CheckpointError, match=r"no checkpoint step 5 in .*; there are \[4\]"):
      checkpoints.restore(small_state(0), step=5)


def test_unfinished_steps_are_ignored_and_removed(tmp_path, caplog):
  with Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(1, small_state(1))
    checkpoints.save(2, small_state(2))
  (tmp_path / "2" / "manifest.json").unlink()
  (tmp_path / "1").rename(tmp_path / "1.replaced")  # killed while step 1 was being written again
  (tmp_path / "1").mkdir()
  (tmp_path / "notes").mkdir()
  assert committed_steps(tmp_path) == []
  with Checkpoints(tmp_path, ALL) as checkpoints:
    assert_identical(checkpoints.restore(small_state(0)).state, small_state(1))
    assert "checkpoint step 2 has no manifest.json, so its saving did not end: it is removed" in caplog.text
    (tmp_path / "3").mkdir()
    checkpoints.restore(small_state(0))
    assert "checkpoint step 3 has no manifest.json: it is being saved, or was not to the end" in caplog.text
    (tmp_path / "3").rmdir()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "notes"]


def test_checkpoints_that_have_all_lost_their_manifests_stay(tmp_path):
  """A run that is killed leaves one like that."""
  with Checkpoints(tmp_path, ALL) as checkpoints:
    for step in (1, 2, 10):
      checkpoints.save(step, small_state(step))
  kept = {step: (tmp_path / step / "manifest.json").read_bytes() for step in ("1", "2", "10")}
  for step in kept:
    (tmp_path / step / "manifest.json").unlink()
  with pytest.raises(CheckpointError, match=r"the checkpoints 1, 2, 10 in .* have lost their manifest.json: put them"):
    Checkpoints(tmp_path, ALL)
  for step, content in kept.items():
    (tmp_path / step / "manifest.json").write_bytes(content)
  with Checkpoints(tmp_path, ALL) as checkpoints:
    assert checkpoints.restore(small_state(0)).step == 10


def run_python(code, *args, devices=1):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
  return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, timeout=120):
  output, _ = process.communicate(timeout=timeout)
  assert process.returncode == 0, output
  return output


FULL_DISK = """
  import resource, sys, jax, jax.numpy as jnp
  from pathlib import Path
  from jaxllm.base.errors import CheckpointError
  from jaxllm.storage.checkpoints import Checkpoints
  from jaxllm.storage.config import CheckpointConfig
  directory, asynchronous = Path(sys.argv[1]), sys.argv[2] == "True"
  if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
  small = {"params": {"w": jnp.arange(100.0)}}
  big = {"params": {"w": jax.random.normal(jax.random.key(0), (2_000_000,))}}
  checkpoints = Checkpoints(directory, CheckpointConfig(asynchronous=asynchronous))
  checkpoints.save(1, small)
  try:
    checkpoints.save(2, big)
    checkpoints.wait()
  except CheckpointError as error:
    print("ERROR:", error)
  print("LEFT:", [p.name for p in directory.iterdir()])
  print("GOOD:", checkpoints.restore(small).step)
  checkpoints.save(3, small)
  checkpoints.close()
  print("STEPS:", checkpoints.steps())
"""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_write_that_fails_leaves_the_earlier_steps(tmp_path, asynchronous):
  # A limit on the size of files fails in the same place as a full disk, and needs no privileges.
  output = finish(run_python(FULL_DISK, tmp_path, asynchronous, 1_000_000))
  last = "the last good checkpoint is step 1"
  assert f"ERROR: cannot save step 2 under {tmp_path}: the file grew too large for its file system" in output
  assert f"or choose another disk; {last}\n" in output
  assert "LEFT: ['1']\nGOOD: 1\nSTEPS: [1, 3]\n" in output


def test_a_full_disk_is_called_so(tmp_path):
  mount = f'mount -t tmpfs -o size=2m none {tmp_path} && exec "$@"'
  prefix = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]), "sh", "-c", mount, "sh"]
  if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
    pytest.skip("this user may not mount a small file system")
  env = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
  code = textwrap.dedent(FULL_DISK)
  result = subprocess.run(
    [*prefix, sys.executable, "-c", code, tmp_path, "True"], env=env, text=True, capture_output=True
  )
  line = (
    f"under {tmp_path}: the disk is full; free some space, or choose another disk; the last good checkpoint is step 1"
  )
  assert line + "\n" in result.stdout, result.stderr
  assert "LEFT: ['1']\nGOOD: 1\nSTEPS: [1, 3]\n" in result.stdout


def test_no_space_for_the_manifest(tmp_path, monkeypatch):
  def full(path, content):
    raise OSError(28, "No space left on device")

  with Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(1, small_state(1))
    checkpoints.wait()
    monkeypatch.setattr("jaxllm.base.digests.write_atomically", full)
    checkpoints.save(2, small_state(2))
    with pytest.raises(CheckpointError, match="cannot save step 2 .*: the disk is full; .* step 1$"):
      checkpoints.save(3, small_state(3))
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path, monkeypatch):
  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("jaxllm.base.digests.write_atomically", full)
  with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, ALL) as checkpoints:
    checkpoints.save(2, small_state(2))
    raise ZeroDivisionError
  with (
    pytest.raises(CheckpointError, match="there is no earlier checkpoint"),
    Checkpoints(tmp_path, ALL) as checkpoints,
  ):
    checkpoints.save(2, small_state(2))


KILLED = """
  import sys, jax, jax.numpy as jnp
  from jaxllm.storage.checkpoints import Checkpoints
  from jaxllm.storage.config import CheckpointConfig
  state = {"params": {str(i): jnp.zeros((64, 1024)) for i in range(4)}, "step": jnp.int32(0)}
  with Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2)) as checkpoints:
    step = -1
    if checkpoints.latest_step() is not None:
      step, state, data = checkpoints.restore(state)
      assert all((x == step).all() for x in state["params"].values()), (step, state)
      assert int(state["step"]) == step and data == {"next": step}, (step, state["step"], data)
    print("from", step, flush=True)
    while True:
      step += 1
      state = jax.tree.map(lambda x: jnp.full_like(x, step), state)
      checkpoints.save(step, state, {"next": step}, {"eval/loss": 1.0 / (step + 1)})
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_at_most_the_save_in_flight(tmp_path):
  moments = random.Random(0)
  started = []
  for _ in range(10):
    committed = committed_steps(tmp_path)
    process = run_python(KILLED, tmp_path)
    line = process.stdout.readline()
    while line and not line.startswith("from "):
      line = process.stdout.readline()
    assert line, "a restart failed"
    started.append(int(line.split()[1]))
    assert started[-1] == max(committed, default=-1)
    time.sleep(moments.uniform(0.05, 1.0))
    process.send_signal(signal.SIGKILL)
    process.communicate()
  # How many steps a life has time for depends on the machine; that lives go on from each other's steps does not.
  assert started == sorted(started) and len(set(started)) > 3


MESHES = """
  import sys, jax, jax.numpy as jnp, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  from jaxllm.storage.checkpoints import Checkpoints
  from jaxllm.storage.config import CheckpointConfig
  a, b = (int(n) for n in sys.argv[2].split("x"))
  mesh = jax.make_mesh((a, b), ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[: a * b])
  specs = {"params": {"w": P("fsdp", "tensor"), "b": P("tensor"), "n": P()}, "key": P()}
  matrix = jnp.arange(512.0).reshape(16, 32)
  values = {"params": {"w": matrix, "b": jnp.arange(16, dtype=jnp.bfloat16), "n": jnp.ones(3, jnp.int8)}}
  values["key"] = jax.random.key(5)
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
  state = jax.device_put(values, shardings)
  with Checkpoints(sys.argv[1], CheckpointConfig(keep_last=9)) as checkpoints:
    for step in checkpoints.steps():
      restored = checkpoints.restore(state, step).state
      for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
        if x.dtype != state["key"].dtype:
          np.testing.assert_array_equal(x, y)
      assert jax.random.bits(restored["key"]) == jax.random.bits(values["key"])
    checkpoints.save(len(checkpoints.steps()), state)
  print("restored", checkpoints.latest_step())
"""


def test_any_mesh_restores_what_any_other_saved(tmp_path):
  for count, mesh in enumerate(("2x4", "4x2", "1x1")):
    assert f"restored {count}" in finish(run_python(MESHES, tmp_path, mesh, devices=8))


PROCESSES = """
  import sys, jax, jax.numpy as jnp, numpy as np
  from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
  directory, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
  from pathlib import Path
  from jaxllm.base.errors import CheckpointError
  from jaxllm.storage.checkpoints import Checkpoints
  from jaxllm.storage.config import CheckpointConfig
  mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Auto,))
  sharding = NamedSharding(mesh, P("fsdp"))
  make = jax.jit(lambda n: {"params": {"w": jnp.arange(4096.0) + n}, "step": n},
                 out_shardings={"params": {"w": sharding}, "step": NamedSharding(mesh, P())})
  with Checkpoints(directory, CheckpointConfig(keep_last=2)) as checkpoints:
    for n in range(1, 4):
      checkpoints.save(n, make(jnp.int32(n)), {"n": n}, {"eval/loss": -n})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3], checkpoints.steps()
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("saved")
    if index == 0:  # damage that only one of the processes will read
      file = max((Path(directory) / "3/state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
      content = bytearray(file.read_bytes()); content[len(content) // 2] ^= 1; file.write_bytes(content)
    multihost_utils.sync_global_devices("damaged")
    step, state, data = checkpoints.restore(make(jnp.int32(0)))
    assert (step, data) == (2, {"n": 2}), (step, data)
    for shard in state["params"]["w"].addressable_shards:
      np.testing.assert_array_equal(shard.data, np.arange(4096.0)[shard.index] + 2)
  print("process", index, "ok")
"""


def test_two_processes_commit_and_fall_back_together(tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  processes = [run_python(PROCESSES, tmp_path, port, index, devices=2) for index in range(2)]
  for index, process in enumerate(processes):
    assert f"process {index} ok" in finish(process)
  with Checkpoints(tmp_path, ALL) as checkpoints:  # and one process goes on from where two were
    step, _, data = checkpoints.restore({"params": {"w": jnp.zeros(4096)}, "step": jnp.int32(0)})
    assert (step, data) == (2, {"n": 2})
  np.testing.assert_array_equal(restore_params(tmp_path)[1]["w"], np.arange(4096.0) + 2)

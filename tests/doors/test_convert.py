"""`jaxllm convert`: what it refuses in one line, and what a kill or a full disk leaves behind."""

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm.base import digests
from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.convert import parse_size
from jaxllm.inference.model import Model
from jaxllm.interop import safetensors
from jaxllm.interop.open import open_model
from jaxllm.interop.tensors import in_memory
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=32, embed_dim=16, num_layers=3, num_heads=2, mlp_dim=24, max_seq_len=16)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
  """A directory with one model as "ours" and as "hf", in shards."""
  folder = tmp_path_factory.mktemp("forms")
  model = Model(CONFIG, init_params(CONFIG, jax.random.key(0)))
  model.save(folder / "ours", max_shard_bytes=8000)
  model.save(folder / "hf", "hf", max_shard_bytes=8000)
  return folder


def same(one, other):
  one, other = open_model(one), open_model(other)
  assert one.config == other.config and one.tensors.keys() == other.tensors.keys()
  for path, tensor in one.tensors.items():
    np.testing.assert_array_equal(tensor.read(), other.tensors[path].read())


def test_there_and_back(door, forms, tmp_path):
  flags = ["--format=hf", "--max-shard-size=9KB"]
  assert door("convert", f"--from={forms / 'ours'}", f"--to={tmp_path / 'hf'}", *flags)[0] == 0
  assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
  code, _, err = door("convert", f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'ours'}", "--format=jaxllm")
  assert code == 0 and "parameters written" in err
  same(forms / "ours", tmp_path / "ours")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "ours"]


def test_gguf(door, forms, tmp_path):
  file = tmp_path / "model.gguf"
  assert door("convert", f"--from={forms / 'ours'}", f"--to={file}", "--format=gguf")[0] == 0
  assert door("convert", f"--from={file}", f"--to={tmp_path / 'back'}", "--format=jaxllm")[0] == 0
  want, got = (open_model(path).tensors for path in (forms / "ours", tmp_path / "back"))
  for path, tensor in want.items():
    np.testing.assert_array_equal(got[path].read(), tensor.read())
  whole = file.stat().st_size
  small = tmp_path / "small.gguf"
  flags = ["--format=gguf", "--dtype=bfloat16"]
  assert door("convert", f"--from={forms / 'hf'}", f"--to={small}", *flags)[0] == 0
  assert small.stat().st_size < whole
  code, _, err = door("convert", f"--from={forms / 'hf'}", f"--to={small}", *flags)
  assert code == 2 and "is there already" in err
  code, _, err = door("convert", f"--from={forms / 'hf'}", f"--to={tmp_path / 'x'}", "--format=gguf", "--quantize=q9")
  assert code == 2 and "q9" in err and not (tmp_path / "x").exists()


def test_a_training_run(door, forms, tmp_path):
  from jaxllm.storage.checkpoints import Checkpoints
  from jaxllm.storage.config import CheckpointConfig

  run = tmp_path / "run"
  run.mkdir()
  shutil.copy(forms / "ours" / "config.json", run)
  early, late = (init_params(CONFIG, jax.random.key(seed)) for seed in (7, 0))
  with Checkpoints(run / "checkpoints", CheckpointConfig()) as checkpoints:
    for step, params in ((3, early), (5, late)):
      checkpoints.save(step, {"params": params, "opt_state": {"mu": params}, "step": np.int32(step)})
  digests.record(run, {}, ["config.json"])
  assert door("convert", f"--from={run}", f"--to={tmp_path / 'out'}", "--format=hf")[0] == 0
  same(forms / "ours", tmp_path / "out")
  assert door("convert", f"--from={run}", f"--to={tmp_path / 'old'}", "--format=jaxllm", "--step=3")[0] == 0
  got = open_model(tmp_path / "old").tensors["embedding/tokens"].read()
  np.testing.assert_array_equal(got, early["embedding"]["tokens"])


def edit(name, **changes):
  def change(path):
    (path / name).write_text(json.dumps(json.loads((path / name).read_text()) | changes))

  return change


def largest(path):
  return max(path.rglob("*.safetensors"), key=lambda p: p.stat().st_size)


def truncate(path):
  data = largest(path).read_bytes()
  largest(path).write_bytes(data[:-10])


def pickled(path):
  for file in path.glob("model*"):
    file.unlink()
  (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def reshaped(path):
  tensors = {
    name: t.read() for name, t in safetensors.read_safetensors(path / "model-00002-of-00004.safetensors").items()
  }
  first = next(iter(tensors))
  tensors[first] = tensors[first][:1]
  safetensors.write_safetensors(path / "model-00002-of-00004.safetensors", in_memory(tensors))


BAD = [
  ("hf", edit("config.json", model_type="mamba"), [], "model_type 'mamba'"),
  ("hf", lambda p: next(p.glob("model-00002*")).unlink(), [], "lacks the shard model-00002"),
  ("hf", truncate, [], "copy it again"),
  ("hf", reshaped, [], "has shape"),
  ("hf", pickled, [], "pytorch_model.bin is no file of PyTorch's tensors"),
  ("hf", edit("config.json", num_hidden_layers=4), [], "lacks the tensor model.layers.3"),
  ("hf", edit("config.json", intermediate_size=28), [], "calls for (28, 16)"),
  ("hf", edit("config.json", quantization_config={"quant_method": "gptq"}), [], "'gptq'"),
  ("hf", lambda p: (p / "config.json").write_text("["), [], "cannot read"),
  ("hf", lambda p: (p / "config.json").unlink(), [], "is not a model"),
  ("ours", truncate, [], "damaged"),
  ("ours", edit("config.json", version=1), [], "layout version 1"),
  ("ours", None, ["--dtype=int3"], "int3"),
  ("ours", None, ["--quantize=q8_0"], "q8_0"),
  ("ours", None, ["--family=llamas", "--format=hf"], "llamas"),
  ("ours", None, ["--family=gpt2", "--format=hf"], "gpt2 checkpoint cannot say"),
  ("ours", None, ["--max-shard-size=5 apples"], "5 apples"),
  ("ours", None, ["--step=3"], "no steps"),
  ("ours", lambda p: (p / "../out/thesis").mkdir(parents=True), [], "other things"),
  ("ours", lambda p: (p.parent / "out").write_text("mine"), [], "it is a file"),
]  # fmt: skip


@pytest.mark.parametrize("form, damage, flags, message", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(door, forms, tmp_path, form, damage, flags, message):
  source = shutil.copytree(forms / form, tmp_path / "source")
  if damage:
    damage(source)
    (source / "jaxllm_manifest.json").unlink(missing_ok=True)  # which would say it first
  before = sorted(tmp_path.rglob("*"))
  code, out, err = door("convert", f"--from={source}", f"--to={tmp_path / 'out'}", "--format=jaxllm", *flags)
  assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
  assert not out and sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(door, forms, tmp_path, monkeypatch):
  write, room = safetensors._write_all, [20_000]

  def limited(file, data):
    room[0] -= memoryview(data).nbytes
    if room[0] < 0:
      raise OSError(errno.ENOSPC, "No space left on device")
    write(file, data)

  monkeypatch.setattr(safetensors, "_write_all", limited)
  code, _, err = door("convert", f"--from={forms / 'ours'}", f"--to={tmp_path / 'out'}", "--format=hf")
  assert code == 2 and "the disk is full" in err and err.count("\n") == 1
  assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from jaxllm import convert
from jaxllm.interop import safetensors
write, left = safetensors._write_all, [int(sys.argv[1])]
def dying(file, data):
  left[0] -= 1
  if left[0] == 0:
    os.kill(os.getpid(), signal.SIGKILL)
  write(file, data)
safetensors._write_all = dying
convert.main(sys.argv[2:])
"""


@pytest.mark.parametrize("source, format", [("hf", "jaxllm"), ("ours", "hf")])
def test_kill_9_leaves_nothing_that_loads(door, forms, tmp_path, source, format):
  flags = [f"--from={forms / source}", f"--to={tmp_path / 'out'}", f"--format={format}"]
  dead = subprocess.run([sys.executable, "-c", KILLED, "9", *flags], cwd=Path.cwd())
  assert dead.returncode == -signal.SIGKILL
  left = list(tmp_path.iterdir())
  assert [p.name for p in left] == [".out.partial"]
  with pytest.raises(CheckpointError):
    open_model(left[0])
  assert door("convert", *flags)[0] == 0
  same(tmp_path / "out", forms / "ours")
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_sizes():
  assert [parse_size(text) for text in ("5GB", "1.5 MB", "2kib", "7b")] == [5 * 10**9, 1_500_000, 2048, 7]
  for text in ("0GB", "GB", "-1MB", "5"):
    with pytest.raises(ConfigError, match="max-shard-size"):
      parse_size(text)

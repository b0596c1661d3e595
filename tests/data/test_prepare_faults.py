"""What the system refuses while data is prepared is one line, and what was done is kept."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.base.errors import DataError
from jaxllm.data import prepare as prepare_module
from jaxllm.data import units
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.manifest import open_any, open_prepared
from jaxllm.data.prepare import prepare


@pytest.fixture
def config(byte_tokenizer, tmp_path):
  (tmp_path / "texts").mkdir()
  for i in range(60):
    (tmp_path / "texts" / f"{i}.txt").write_text(f"words {i} " * 200)
  source = SourceConfig(path=f"{tmp_path}/texts/*.txt", name="s")
  return DataConfig(str(tmp_path / "out"), (source,), TokenizerConfig(str(byte_tokenizer)), heldout_fraction=0.2)


def test_a_disk_that_is_full(config):
  """A limit on the size of files stands for it: the same calls fail."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
  try:
    with pytest.raises(DataError, match=r"cannot write .*out/partial-.*: the file grew too large") as caught:
      prepare(config, log=str)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert "\n" not in str(caught.value)
  with pytest.raises(DataError, match="no prepared data in"):
    open_prepared(config)
  assert prepare(config, log=str).prepared.total("train", "documents") > 30
  assert len(list(os.scandir(config.dir))) == 3  # lock, manifest and build


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written(config, tmp_path):
  (tmp_path / "closed").mkdir(mode=0o500)
  with pytest.raises(DataError, match="cannot write .*permission denied"):
    prepare(dataclasses.replace(config, dir=f"{tmp_path}/closed/data"), log=str)


@pytest.mark.parametrize(
  "number, text", [(30, "the file system is read-only"), (13, "permission denied"), (28, "the disk is full")]
)
def test_what_the_system_refuses(config, monkeypatch, number, text):
  def refuse(*_):
    raise OSError(number, os.strerror(number), f"{config.dir}/partial-x/file")

  with monkeypatch.context() as patch:
    patch.setattr(prepare_module, "publish", refuse)
    with pytest.raises(DataError, match=f"cannot write .*partial-x/file: {text}") as caught:
      prepare(config, log=str)
  assert "\n" not in str(caught.value)
  assert not prepare(config, log=str).already


def test_too_many_open_files(config):
  code = f"""
import resource
from jaxllm.data.config import *
from jaxllm.data.prepare import prepare
from jaxllm.base.errors import UserError
import tensorflow_datasets, array_record.python.array_record_module
resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
source = SourceConfig(path={config.sources[0].path!r}, name="s")
try:
  prepare(DataConfig({config.dir!r}, (source,), TokenizerConfig({config.tokenizer.path!r})), log=str, processes=1)
  print("whole")
except UserError as error:
  print(error)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  said = done.stdout.strip()
  assert said == "whole" or ("too many open files" in said and "\n" not in said)


def test_a_worker_that_is_killed(config, monkeypatch):
  """As the kernel does where memory runs out."""
  from jaxllm.data import units

  monkeypatch.setattr(units, "_SMALLEST", 25_000)
  original = subprocess.Popen

  def start(*args, **kwargs):
    process = original(*args, **kwargs)
    process.send_signal(signal.SIGKILL)
    return process

  with monkeypatch.context() as patch:
    patch.setattr(subprocess, "Popen", start)
    with pytest.raises(DataError, match=r"killed by signal 9 \(out of memory\?\): run the same command again"):
      prepare(config, log=str, processes=2)
  assert not prepare(config, log=str, processes=1).already


def test_ctrl_c_while_a_tokenizer_is_trained(tmp_path):
  """It is no failure of SentencePiece's."""
  import random

  draw = random.Random(0)
  words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 9))) for _ in range(20_000)]
  (tmp_path / "a.txt").write_text(" ".join(draw.choices(words, k=300_000)))
  code = f"""
from jaxllm.base import stopping
from jaxllm.cli import run_door
from jaxllm.data import prepare
from jaxllm.data.config import *
original = prepare.train_sentencepiece
def train(*args):
  print("training", flush=True)
  return original(*args)
prepare.train_sentencepiece = train
sources = (SourceConfig(path={str(tmp_path)!r} + "/a.txt"),)
config = DataConfig({str(tmp_path / "out")!r}, sources, TokenizerConfig(vocab_size=15000), heldout_fraction=0)
code = run_door(lambda argv: prepare.prepare(config))
stopping.leave(code)  # as the doors do: SentencePiece still computes
"""
  process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert process.stdout is not None and process.stdout.readline() == "training\n"
  time.sleep(0.4)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, "stopped\n")


@pytest.mark.parametrize("name", ["facts.json", "*.npy", "jaxllm_manifest.json"])
@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_text("{")])
def test_what_is_taken_over_is_what_was_written(config, name, damage):
  """A unit's results that were damaged between two runs are made again."""
  small = dataclasses.replace(config.tokenizer, path="", vocab_size=100_000)
  with pytest.raises(DataError, match="the corpus is too small"):
    prepare(dataclasses.replace(config, tokenizer=small), log=str)
  (unit,) = Path(config.dir).glob("partial-*/survey/*/done")
  damage(next(unit.glob(name)))
  lines = []
  with pytest.raises(DataError, match="the corpus is too small"):
    prepare(dataclasses.replace(config, tokenizer=small), log=lines.append)
  assert [line for line in lines if "is made again" in line]


def test_what_others_have_called_a_build_stays(config):
  """`data.dir` may be a folder of more than data."""
  for name in ("build-release", "partial-results", "build-1"):
    (Path(config.dir) / name).mkdir(parents=True)
  prepare(config, log=str)
  prepare(dataclasses.replace(config, heldout_fraction=0.3), log=str)
  assert {"build-release", "partial-results", "build-1"} < {path.name for path in Path(config.dir).iterdir()}
  assert len(list(Path(config.dir).glob("build-*-*"))) == 1


def test_data_of_another_version_is_called_so(config):
  manifest = prepare(config, log=str).prepared.dir / "manifest.json"
  manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
  with pytest.raises(DataError, match="was prepared by another version"):
    open_prepared(config)


def replaced(file, text):
  file.unlink()
  file.write_text(text)


CHANGES = {
  "other text of the same length": lambda file: file.write_text("w" * file.stat().st_size),
  "another file of that length": lambda file: replaced(file, "w" * file.stat().st_size),
  "cut short": lambda file: os.truncate(file, 10),
  "grown": lambda file: file.write_text(file.read_text() + "more"),
  "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("stage", ["survey", "tokenize"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changes_meanwhile(config, tmp_path, monkeypatch, stage, change):
  """Between two passes, or while one reads it: what would be written is of no corpus that there ever was."""
  from jaxllm.data import crew

  original, file = crew.do_stage, tmp_path / "texts" / "31.txt"
  before = file.read_text(), file.stat()

  def do_stage(job, name, *arguments):
    if name == stage:
      CHANGES[change](file)
      if file.exists():
        os.utime(file, ns=(0, before[1].st_mtime_ns + 1))
    original(job, name, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(prepare_module, "do_stage", do_stage)
    said = f"cannot read {file}: there is no such file" if change == "deleted" else f"{file} changed while it was being"
    with pytest.raises(DataError, match=said) as caught:
      prepare(config, log=str)
  assert "\n" not in str(caught.value)
  with pytest.raises(DataError, match="no prepared data in"):
    open_prepared(config)
  file.write_text(before[0])
  assert not prepare(config, log=str).already
  assert len(list(os.scandir(config.dir))) == 3  # nothing is left of what was begun


def test_rows_that_change_meanwhile(tmp_path, byte_tokenizer, monkeypatch):
  """Of what has no files: other rows of the same lengths."""
  passes: list = []

  class Rows:
    stamp = "always"

    def __init__(self, config):
      pass

    def units(self):
      return [units.Unit((), 0, 20, 0, 400)]

    def read(self, unit):
      passes.append(unit)
      for row in range(20):
        yield f":{row}", {"text": f"row {row} of pass {len(passes)}"}, f"row {row}"

  monkeypatch.setattr("jaxllm.data.sources.Library", Rows)
  source = SourceConfig(kind="huggingface", path="x", name="s")
  config = DataConfig(str(tmp_path / "out"), (source,), TokenizerConfig(str(byte_tokenizer)))
  with pytest.raises(DataError, match="rows from 0 changed while it was being read"):
    prepare(config, log=str, processes=1)


@pytest.mark.parametrize("damage", ["unsealed", "changed"])
def test_a_tokenizer_is_taken_over_only_as_it_was_written(config, monkeypatch, damage):
  """And of what was made with another nothing stays."""
  from jaxllm.data import crew

  class Stop(Exception):
    pass

  def publish(*_):
    raise Stop

  trained, original = dataclasses.replace(config, tokenizer=TokenizerConfig(vocab_size=280)), crew.work_through
  stages: list[str] = []

  def work_through(job, stage, *rest):
    stages.append(stage)
    original(job, stage, *rest)

  for way, job in (("whole", trained), (damage, dataclasses.replace(trained, dir=f"{config.dir}-2"))):
    with monkeypatch.context() as patch, pytest.raises(Stop):
      patch.setattr(prepare_module, "publish", publish)
      prepare(job, log=str)
    (tokenizer,) = Path(job.dir).glob("partial-*/tokenizer")
    if way == "unsealed":
      (tokenizer / "jaxllm_manifest.json").unlink()
    elif way == "changed":
      next(tokenizer.glob("*.model")).write_bytes(b"other")
    with monkeypatch.context() as patch:
      patch.setattr(crew, "work_through", work_through)
      prepared = prepare(job, log=(lines := []).append, processes=1).prepared
    assert stages == ([] if way == "whole" else ["tokenize"])
    assert bool([line for line in lines if "is made again" in line]) == (way != "whole")
    assert not list(prepared.tokenizer_dir.glob("jaxllm_manifest.json"))
    assert prepared.tokenizer().fingerprint == prepared.tokenizer_fingerprint


def test_a_build_that_a_program_reads_stays(config):
  """A training run reads on when its directory is prepared with other settings; the next prepare clears up."""
  old = prepare(config, log=str).prepared
  code = f"""
import dataclasses, sys
from jaxllm.data.config import *
from jaxllm.data.manifest import open_any
from jaxllm.base.errors import UserError
prepared = open_any({config.dir!r})
print(prepared.build, flush=True)
sys.stdin.readline()
(source,) = prepared.sources
print(sum(len(prepared.documents(source, "train").record(i).tokens) for i in range(source.train.documents)), flush=True)
sys.stdin.readline()
"""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  with subprocess.Popen([sys.executable, "-c", code], **pipes) as reader:
    assert reader.stdout.readline().strip() == old.build
    other = dataclasses.replace(config, heldout_fraction=0.4)
    new = prepare(other, log=(lines := []).append).prepared
    assert f"{old.root} is what a program that still runs reads; the next prepare removes it" in lines
    assert open_any(config.dir).build == new.build != old.build
    reader.stdin.write("\n")
    reader.stdin.flush()
    assert int(reader.stdout.readline()) == old.total("train", "tokens") != new.total("train", "tokens")
    reader.kill()
  assert prepare(other, log=str).already and not old.root.exists()

"""The same bytes however many processes and hosts prepare, and however often they are killed."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxllm.base.errors import DataError
from jaxllm.data import units
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.manifest import open_prepared
from jaxllm.data.prepare import prepare

SCRIPT = """
import sys
from jaxllm.base.settings import from_mapping
from jaxllm.data import units
from jaxllm.data.config import DataConfig
from jaxllm.data.prepare import prepare
import json
units._SMALLEST = int(sys.argv[2])
config = from_mapping(DataConfig, json.loads(sys.argv[1]))
info = prepare(config, log=lambda line: None, processes=int(sys.argv[3]), shared=sys.argv[4] == "shared")
print(info.prepared.build)
"""
UNIT = 20_000


def content(config) -> dict[str, str]:
  """The digest of every file of a build, and the manifest without the build's name."""
  prepared = open_prepared(config)
  files = {
    str(path.relative_to(prepared.root)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in prepared.root.rglob("*")
    if path.is_file()
  }
  manifest = json.loads((prepared.dir / "manifest.json").read_bytes())
  del manifest["build"], manifest["sha256"]
  return files | {"manifest": json.dumps(manifest)}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
  """JSON lines of 1 to 3000 bytes, one of them longer than a unit, with duplicates and empty ones."""
  path = tmp_path_factory.mktemp("lines") / "corpus.jsonl"
  draw = random.Random(0)
  texts = [
    " ".join(draw.choices(["river", "stone", "und", "das", "Haus\n"], k=draw.randint(0, 400))) for _ in range(110)
  ]
  texts[40] = "long " * 12_000
  texts[90:100] = texts[10:20]
  path.write_text("".join(json.dumps({"text": text}) + "\n" + ("\n" if len(text) % 7 == 0 else "") for text in texts))
  return path


@pytest.fixture
def config(lines, byte_tokenizer, tmp_path):
  source = SourceConfig(kind="jsonl", path=str(lines), name="lines")
  return DataConfig(str(tmp_path / "out"), (source,), TokenizerConfig(str(byte_tokenizer)), heldout_fraction=0.1)


def start(config, processes=2, shared=False, unit=UNIT):
  arguments = [json.dumps(dataclasses.asdict(config)), str(unit), str(processes), "shared" if shared else "alone"]
  return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process) -> str:
  out, err = process.communicate(timeout=100)
  assert process.returncode == 0, err.decode()
  return out.decode().strip()


@pytest.fixture
def expected(config, monkeypatch):
  """What one process makes of it without interruption, in units of its own size."""
  with monkeypatch.context() as patch:
    patch.setattr(units, "_SMALLEST", UNIT)
    alone = dataclasses.replace(config, dir=config.dir + "-alone")
    prepare(alone, log=lambda line: None, processes=1)
  return content(alone)


def test_units_do_not_change_documents(config, lines, monkeypatch):
  """Ids, texts and split are those of a file that is read in one piece."""
  whole = prepare(config, log=lambda line: None).prepared
  found = []
  for size in (5_000, 30_000):
    monkeypatch.setattr(units, "_SMALLEST", size)
    parts = prepare(dataclasses.replace(config, dir=f"{config.dir}{size}"), log=lambda line: None, processes=1).prepared
    assert parts.sources[0].train.shards > 3
    found.append(parts)
  for prepared in (whole, *found):
    for split in ("train", "heldout"):
      documents, before = prepared.documents(prepared.sources[0], split), whole.documents(whole.sources[0], split)
      assert [documents.record(i).id for i in range(len(documents))] == [
        before.record(i).id for i in range(len(before))
      ]
      assert all((documents.framed(i) == before.framed(i)).all() for i in range(len(documents)))
  rows = [json.loads(line)["text"] if line.strip() else "" for line in lines.read_text().split("\n")]
  documents = whole.documents(whole.sources[0], "train")
  for i in range(len(documents)):
    record = documents.record(i)
    assert bytes(record.tokens.astype("u1")) == rows[int(record.id.rpartition(b":")[2]) - 1].encode()


@pytest.mark.parametrize("processes", [4])
def test_processes_write_the_same_bytes(config, expected, processes):
  finished(start(config, processes))
  assert content(config) == expected


def test_killed_and_resumed_the_same_bytes(config, expected):
  draw = random.Random(0)
  for _ in range(3):
    process = start(config, 2)
    time.sleep(draw.uniform(0.3, 2.0))
    crew = children_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 20
    while any(map(_alive, crew)) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert not any(map(_alive, crew))  # they end with the process that has started them
  finished(start(config, 2))
  assert content(config) == expected
  assert sorted(path.name for path in open_prepared(config).dir.iterdir() if path.name != "lock") == sorted(
    [open_prepared(config).build, "manifest.json"]
  )


def test_what_is_done_is_not_done_again(config, expected, monkeypatch):
  from jaxllm.data import job, tokenize

  monkeypatch.setattr(units, "_SMALLEST", UNIT)
  original, done = tokenize.Tokenize.__call__, []

  def stop_at_the_third(self, number, directory):
    if len(done) == 3:
      raise KeyboardInterrupt
    original(self, number, directory)
    done.append(number)

  with monkeypatch.context() as patch:
    patch.setattr(tokenize.Tokenize, "__call__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
      prepare(config, log=lambda line: None, processes=1)
  first, done[:] = list(done), []

  def note(self, number, directory):
    original(self, number, directory)
    done.append(number)

  monkeypatch.setattr(tokenize.Tokenize, "__call__", note)
  monkeypatch.setattr(job.shutil, "rmtree", job.shutil.rmtree)
  prepare(config, log=lambda line: None, processes=1)
  assert first == [0, 1, 2] and not set(first) & set(done)
  assert content(config) == expected


def test_hosts_share_the_work_and_take_over(config, expected):
  """Two runs on one directory, of which the one that leads is killed."""
  leader = start(config, 1, shared=True)
  deadline = time.monotonic() + 60
  while not list(open_dir(config).glob("partial-*/stage")) and time.monotonic() < deadline:
    time.sleep(0.02)
  other = start(config, 1, shared=True)
  time.sleep(0.5)
  leader.send_signal(signal.SIGKILL)
  leader.communicate()
  finished(other)
  assert content(config) == expected


def open_dir(config):
  from pathlib import Path

  return Path(config.dir)


def children_of(pid: int) -> list[int]:
  found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
  return [int(word) for word in found.stdout.split()]


def test_ctrl_c_leaves_no_process(config):
  process = start(config, 2, unit=2000)
  deadline = time.monotonic() + 60
  while len(crew := children_of(process.pid)) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=30)
  assert process.returncode != 0 and b"KeyboardInterrupt" in err
  assert len(crew) == 2 and not any(os.path.exists(f"/proc/{pid}/cmdline") and _alive(pid) for pid in crew)


def _alive(pid: int) -> bool:
  try:
    return "jaxllm.data.worker" in open(f"/proc/{pid}/cmdline").read()
  except OSError:
    return False


def test_an_error_in_a_process_is_one_line(config, tmp_path, monkeypatch):
  monkeypatch.setattr(units, "_SMALLEST", 500)
  path = tmp_path / "bad.jsonl"
  path.write_text('{"text": "fine"}\n' * 100 + "{bad\n" + '{"text": "fine"}\n' * 100)
  bad = dataclasses.replace(config, sources=(SourceConfig(kind="jsonl", path=str(path)),))
  with pytest.raises(DataError, match=r"bad.jsonl:101: not a JSON object") as caught:
    prepare(bad, log=lambda line: None, processes=2)
  assert "\n" not in str(caught.value)


def test_duplicates_are_counted(config):
  said = []
  prepared = prepare(config, log=said.append).prepared
  assert prepared.duplicates >= 9  # ten texts stand twice; empty ones are left out
  train, held = (
    {bytes(documents.record(i).tokens.astype("u1")) for i in range(len(documents))}
    for documents in (prepared.documents(prepared.sources[0], split) for split in ("train", "heldout"))
  )
  assert prepared.heldout_duplicates == len(train & held)
  assert any("word for word" in line for line in said) == bool(train & held)


def test_results_of_other_units_are_not_taken(config, expected, monkeypatch):
  """As those of an older version, which has cut the source otherwise."""
  from jaxllm.data import prepare as module

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(units, "_SMALLEST", 3 * UNIT)
    patch.setattr(module, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
      prepare(config, log=lambda line: None, processes=1)
  monkeypatch.setattr(units, "_SMALLEST", UNIT)
  prepare(config, log=lambda line: None, processes=1)
  assert content(config) == expected

"""Splits, counts and shards of `prepare`; idempotence; what a kill leaves behind."""

import codecs
import dataclasses
import gzip
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from oddities import ODDITIES

from jaxllm.base.errors import DataError
from jaxllm.data import prepare as prepare_module
from jaxllm.data import units
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.manifest import open_prepared, read_manifest
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import open_source
from jaxllm.prepare import prepare_and_report


def quiet(config):
  return prepare(config, log=lambda line: None)


def records(prepared, split):
  return [
    documents.record(i)
    for source in prepared.sources
    for documents in [prepared.documents(source, split)]
    for i in range(len(documents))
  ]


def by_hash(documents):
  return sorted(documents, key=lambda d: hashlib.blake2b(d.id.encode(), digest_size=8).digest())


def test_shards_hold_each_document_once_and_losslessly(config):
  prepared = open_prepared(config)
  tokenizer = prepared.tokenizer()
  assert tokenizer.fingerprint == prepared.tokenizer_fingerprint
  corpus = {document.id.encode(): document.data for document in open_source(config.sources[0]).documents()}
  found = {split: records(prepared, split) for split in ("train", "heldout")}
  everything = found["train"] + found["heldout"]
  assert sorted(record.id for record in everything) == sorted(corpus)
  for record in everything:
    assert tokenizer.decode_bytes(record.tokens) == corpus[record.id]
    assert record.num_bytes == len(corpus[record.id])
    assert record.tokens.dtype == np.int32
  for split, rows in found.items():
    info = getattr(prepared.sources[0], split)
    assert info.documents == len(rows)
    assert info.bytes == sum(record.num_bytes for record in rows) == prepared.total(split, "bytes")
    assert info.tokens == sum(len(record.tokens) for record in rows)
    assert prepared.token_counts(prepared.sources[0], split).tolist() == [len(record.tokens) for record in rows]
  raw = b"".join(corpus[record.id] for record in found["heldout"])
  assert prepared.heldout_path.read_bytes() == raw
  assert prepared.heldout_lengths().tolist() == [record.num_bytes for record in found["heldout"]]
  assert len(gzip.compress(raw)) < len(raw)
  assert "tensorflow" not in sys.modules


def test_warns_of_bytes_that_are_not_utf8(corpus, byte_tokenizer, tmp_path):
  lines = []
  source = SourceConfig(path=f"{corpus}/odd*.txt", name="odd")
  prepare(DataConfig(str(tmp_path), (source,), TokenizerConfig(str(byte_tokenizer))), log=lines.append)
  assert lines == ["warning: 1 documents of 'odd' are not UTF-8, the first is 'odd/odd4.txt'; their bytes are kept"]
  assert read_manifest(tmp_path).sources[0].not_utf8_documents == 1


@pytest.fixture
def files(tmp_path):
  root = tmp_path / "files"
  root.mkdir()
  for i in range(200):
    (root / f"{i}.txt").write_bytes(b"x" * (i + 1))
  return root


@pytest.fixture
def base(files, byte_tokenizer, tmp_path):
  source = SourceConfig(path=f"{files}/*.txt", name="s")
  return DataConfig(str(tmp_path / "out"), (source,), TokenizerConfig(str(byte_tokenizer)), heldout_fraction=0.1)


def heldout_ids(prepared):
  return {record.id.decode() for record in records(prepared, "heldout")}


def test_split_is_by_hash_of_the_id(base, files):
  before = heldout_ids(quiet(base).prepared)
  documents = list(open_source(base.sources[0]).documents())
  below = lambda i: int(hashlib.blake2b(i.encode(), digest_size=8).hexdigest(), 16) < 0.1 * 2**64  # noqa: E731
  assert before == {d.id for d in documents if below(d.id)}
  assert 8 <= len(before) <= 35
  # New documents and new text leave the others where they were.
  (files / "new.txt").write_bytes(b"new")
  (files / "7.txt").write_bytes(b"changed")
  after = heldout_ids(quiet(base).prepared)
  assert after - {"s/new.txt"} == before


def test_heldout_bytes_are_capped_lowest_hashes_first(base):
  documents = {d.id: len(d.data) for d in open_source(base.sources[0]).documents()}
  prepared = quiet(dataclasses.replace(base, max_heldout_bytes=300)).prepared
  held = heldout_ids(prepared)
  assert held and sum(documents[i] for i in held) == prepared.total("heldout", "bytes") <= 300
  assert len(records(prepared, "train")) == 200 - len(held)
  lowest = by_hash(open_source(base.sources[0]).documents())[0]
  assert lowest.id in held or len(lowest.data) > 300


def test_something_is_held_out_where_possible(base):
  prepared = quiet(dataclasses.replace(base, heldout_fraction=1e-9)).prepared
  assert heldout_ids(prepared) == {by_hash(open_source(base.sources[0]).documents())[0].id}
  assert quiet(dataclasses.replace(base, heldout_fraction=0.0)).prepared.total("heldout", "documents") == 0


def test_a_corpus_of_one_document_warns(files, base):
  lines = []
  one = dataclasses.replace(base, sources=(SourceConfig(path=f"{files}/1.txt"),))
  info = prepare(one, log=lines.append)
  assert info.prepared.total("train", "documents") == 1
  assert len(lines) == 1 and "no document is held out" in lines[0]


def test_empty_documents_are_left_out_and_counted(base, files):
  for i in range(3):
    (files / f"empty{i}.txt").write_bytes(b"")
  prepared = quiet(base).prepared
  assert prepared.sources[0].empty_documents == 3
  assert prepared.total("train", "documents") + prepared.total("heldout", "documents") == 200


def test_second_run_does_nothing(base, monkeypatch):
  first = quiet(base)
  assert not first.already
  times = {path: path.stat().st_mtime_ns for path in first.prepared.dir.rglob("*") if path.is_file()}
  with monkeypatch.context() as patch:
    patch.setattr(prepare_module, "_build", None)  # must not be reached
    second = quiet(base)
    # How the data is read does not matter to what is prepared.
    reading = dataclasses.replace(
      base, packing="none", epochs=3, workers=2, sources=(dataclasses.replace(base.sources[0], weight=5.0),)
    )
    assert quiet(reading).already
  assert second.already and second.prepared == first.prepared
  assert {p: t for p, t in times.items() if p.name != "lock"} == {
    p: p.stat().st_mtime_ns for p in times if p.name != "lock"
  }
  assert open_prepared(reading) == first.prepared


def test_changes_rebuild_and_old_builds_go(base, files):
  builds = [quiet(base).prepared]
  (files / "5.txt").write_bytes(b"other")
  builds.append(quiet(base).prepared)
  base = dataclasses.replace(base, heldout_fraction=0.3)
  builds.append(quiet(base).prepared)
  (builds[-1].tokenizer_dir / "tokenizer.json").unlink()  # damage
  builds.append(quiet(base).prepared)
  assert len({prepared.build for prepared in builds}) == 4
  assert [path.name for path in builds[0].dir.glob("build-*")] == [builds[-1].build]
  assert quiet(base).already


def test_touching_files_keeps_the_content(base, files):
  before = quiet(base).prepared
  os.utime(files / "5.txt", ns=(1, 1))
  after = quiet(base).prepared
  assert after.build != before.build and after.content == before.content
  (files / "5.txt").write_bytes(b"yyyyyy")
  assert quiet(base).prepared.content != before.content


def test_other_files_in_the_directory_are_left_alone(base, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine.txt").write_text("keep")
  quiet(base)
  quiet(dataclasses.replace(base, heldout_fraction=0.3))
  assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_large_sources_are_written_in_parts(base, monkeypatch):
  whole = quiet(base).prepared
  monkeypatch.setattr(units, "_SMALLEST", 5000)
  parts = quiet(dataclasses.replace(base, dir=base.dir + "2")).prepared
  assert len(parts.sources[0].train.records) == parts.sources[0].train.shards > 3
  for split in ("train", "heldout"):
    left, right = records(whole, split), records(parts, split)
    assert [r.id for r in left] == [r.id for r in right]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(left, right, strict=True))
  assert whole.heldout_path.read_bytes() == parts.heldout_path.read_bytes()


STAGES = {
  "before any shard": ("jaxllm.data.tokenize", "ShardWriter"),
  "before the manifest": ("jaxllm.data.manifest", "write_manifest"),
  "manifest written, not yet in place": ("os", "replace"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_kill_leaves_the_old_build_or_none(corpus, byte_tokenizer, tmp_path, stage):
  module, name = STAGES[stage]
  script = f"""
import importlib, os, signal, sys
from jaxllm.data import manifest, prepare
from jaxllm.data.config import *
module = importlib.import_module({module!r})
def kill(*args, **kwargs):
  if {name!r} != "replace" or str(args[1]).endswith("manifest.json"):
    os.kill(os.getpid(), signal.SIGKILL)
  return original(*args, **kwargs)
original = module.{name}
module.{name} = kill
source = SourceConfig(path={str(corpus)!r} + "/**/*.txt")
prepare.prepare(DataConfig({str(tmp_path / "out")!r}, (source,), TokenizerConfig({str(byte_tokenizer)!r})))
"""
  config = DataConfig(
    str(tmp_path / "out"), (SourceConfig(path=f"{corpus}/**/*.txt"),), TokenizerConfig(str(byte_tokenizer))
  )

  def run_and_die():
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=os.getcwd())
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()

  run_and_die()
  with pytest.raises(DataError, match="no prepared data in|manifest.json is missing"):
    open_prepared(config)
  other = dataclasses.replace(config, heldout_fraction=0.3)
  old = quiet(other).prepared
  run_and_die()
  assert open_prepared(other) == old
  assert len(records(old, "train")) == old.total("train", "documents")
  assert not quiet(config).already
  assert len(list((tmp_path / "out").glob("build-*"))) == 1
  assert open_prepared(config).total("train", "documents") > 40


def test_two_processes_at_once(corpus, byte_tokenizer, tmp_path):
  script = f"""
from jaxllm.data.prepare import prepare
from jaxllm.data.config import *
source = SourceConfig(path={str(corpus)!r} + "/**/*.txt")
info = prepare(DataConfig({str(tmp_path)!r}, (source,), TokenizerConfig({str(byte_tokenizer)!r})), log=str)
print(info.already, info.prepared.build)
"""
  command = [sys.executable, "-c", script]
  running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
  results = sorted(process.communicate()[0].split() for process in running)
  assert [already for already, _ in results] == ["False", "True"]
  assert results[0][1] == results[1][1]


def fails(config, match):
  with pytest.raises(DataError, match=match) as caught:
    quiet(config)
  assert "\n" not in str(caught.value)


def test_errors(base, files, tmp_path):
  fails(dataclasses.replace(base, sources=()), "data.sources is empty")
  fails(dataclasses.replace(base, heldout_fraction=1.0), "heldout_fraction is 1.0")
  fails(dataclasses.replace(base, sources=base.sources * 2), "two data sources are called 's'")
  (tmp_path / "void").mkdir()
  (tmp_path / "void" / "a.txt").write_bytes(b"")
  void = dataclasses.replace(base, sources=(SourceConfig(path=f"{tmp_path}/void/*.txt"),))
  fails(void, "data source 'void' is empty: it has 1 documents")
  (tmp_path / "file").write_text("")
  fails(dataclasses.replace(base, dir=f"{tmp_path}/file"), "cannot write .*it is there already")
  fails(dataclasses.replace(base, tokenizer=TokenizerConfig(path="/none")), "cannot read the tokenizer /none")
  # A build that fails leaves nothing behind.
  fails(dataclasses.replace(base, tokenizer=TokenizerConfig(vocab_size=9999)), "too small for .*vocab_size 9999")
  assert not list((tmp_path / "out").glob("build-*"))


def test_corpus_changed_while_reading(base, files, monkeypatch):
  original = prepare_module.choose_heldout

  def change(*args):
    (files / "3.txt").write_bytes(b"suddenly longer")
    return original(*args)

  monkeypatch.setattr(prepare_module, "choose_heldout", change)
  fails(base, r"/files/3.txt changed while it was being prepared: run python -m jaxllm.prepare again")


def test_opening_errors(base):
  with pytest.raises(DataError, match="no prepared data in .*run python -m jaxllm.prepare"):
    open_prepared(base)
  prepared = quiet(base).prepared
  with pytest.raises(DataError, match="prepared with another data.heldout_fraction"):
    open_prepared(dataclasses.replace(base, heldout_fraction=0.2))
  with pytest.raises(DataError, match="prepared with another data.sources"):
    open_prepared(dataclasses.replace(base, sources=(SourceConfig(path="elsewhere"),)))
  [shard] = prepared.root.glob("shards/s/*/s-train*")
  content = shard.read_bytes()
  shard.write_bytes(content[:100])
  with pytest.raises(DataError, match="s-train.* is damaged or missing"):
    open_prepared(base)
  shard.write_bytes(bytes(len(content)))
  with pytest.raises(DataError, match="is damaged"):
    records(open_prepared(base), "train")
  (prepared.dir / "manifest.json").write_text("{")
  with pytest.raises(DataError, match="manifest.json is damaged"):
    open_prepared(base)


def test_door_reports(base, capsys):
  assert prepare_and_report(base) == 0
  assert prepare_and_report(base) == 0
  out = capsys.readouterr().out
  assert re.search(r"^s +train +\d+ +[\d,]+ +[\d,]+ +1\.00 +1$", out, re.M)
  assert out.count("already prepared: ") == 1


def test_tfds_reads_what_was_written(config):
  """The shards are an ordinary TFDS dataset, for anyone's use."""
  import tensorflow_datasets as tfds

  prepared = open_prepared(config)
  builder = tfds.builder_from_directory(str(prepared.root / "shards" / "words" / "1.0.0"))
  assert builder.info.splits["train"].num_examples == prepared.total("train", "documents")
  assert set(builder.as_data_source("heldout")[0]) == {"tokens", "bytes", "id"}


def test_nothing_of_the_oddities_is_lost(config):
  prepared = open_prepared(config)
  tokenizer = prepared.tokenizer()
  texts = {tokenizer.decode_bytes(r.tokens) for split in ("train", "heldout") for r in records(prepared, split)}
  assert {data.removeprefix(codecs.BOM_UTF8) for data in ODDITIES} <= texts  # a mark is no text


def test_prepared_data_can_be_moved(config, tmp_path):
  moved = dataclasses.replace(config, dir=str(tmp_path / "moved"))
  shutil.copytree(config.dir, moved.dir)
  assert len(records(open_prepared(moved), "train")) == open_prepared(config).total("train", "documents")

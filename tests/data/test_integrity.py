"""What was prepared is what is read: each file changed, cut or deleted is one clear line, or does no harm."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from jaxllm.base.errors import DataError
from jaxllm.data import manifest as manifests
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.data.prepare import prepare


@pytest.fixture
def copy(mixture, tmp_path):
  """The prepared mixture in a place of its own, as another process sees it."""
  shutil.copytree(mixture.dir, tmp_path / "copy")
  manifests._checked.clear()
  return dataclasses.replace(mixture, dir=str(tmp_path / "copy"))


def use(config):
  """Everything that reads prepared data."""
  prepared = open_prepared(config)
  next(train_batches(config, batch_size=2, seq_len=32, seed=0))
  batches = heldout_batches(config, batch_size=2, seq_len=32)
  b"".join(prepared.heldout_texts())
  b"".join(prepared.train_text())
  return prepared.tokenizer().vocab_size, sum(len(list(batch)) for batch in batches), prepared.content


def names(config):
  prepared = open_prepared(config)
  return sorted(prepared.files), prepared


def test_every_file_of_a_build_is_checked(copy):
  files, prepared = names(copy)
  used, seen = use(copy), set()
  assert any("token_counts" in name for name in files) and any("tokenizer" in name for name in files)
  for name in files:
    path = prepared.root / name
    data = path.read_bytes()
    if not data:
      continue
    for at in {0, len(data) // 2, len(data) - 1}:
      for damaged in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at], None):
        path.unlink()
        if damaged is not None:
          path.write_bytes(damaged)
        manifests._checked.clear()  # as in a process that starts
        try:
          assert use(copy) == used
        except AssertionError:
          raise AssertionError(f"{name} has changed what is read") from None
        except DataError as error:
          assert "\n" not in str(error) and len(str(error)) < 400
          assert name in str(error) or "shards" in str(error)
          seen.add(name)
        path.write_bytes(data)
  assert use(copy) == used
  # What nobody has read: a byte of a shard, and what belongs to splits without documents.
  empty = {
    f"_{info.name}_{split}."
    for info in prepared.sources
    for split in ("train", "heldout")
    if not getattr(info, split).documents
  }
  unread = {name for name in files if manifests.is_shard(name) or any(part in name for part in empty)}
  assert set(files) - seen <= unread


@pytest.mark.parametrize("name", ["heldout_lengths.npy", "tokenizer/tokenizer.model", "heldout.bin"])
def test_a_link_to_nothing_is_a_file_that_is_missing(copy, name):
  _, prepared = names(copy)
  name = next(each for each in prepared.files if each.startswith(name.rpartition(".")[0]))
  (prepared.root / name).unlink()
  (prepared.root / name).symlink_to("nothing")
  with pytest.raises(DataError, match=f"{name} is damaged or missing"):
    open_prepared(copy)


def test_token_counts_by_one(copy):
  _, prepared = names(copy)
  path = manifests.counts_path(prepared.root, "first", "train")
  counts = np.load(path)
  counts[3] += 1
  np.save(path, counts)
  with pytest.raises(DataError, match="token_counts_first_train.npy is damaged or missing: delete .*manifest.json and"):
    train_batches(copy, batch_size=2, seq_len=32, seed=0)


def test_manifest(copy):
  path = open_prepared(copy).dir / "manifest.json"
  text = path.read_text()
  with pytest.raises(DataError, match="manifest.json is damaged: delete it"):
    path.write_text(text.replace('"eos_id": 256', '"eos_id": 255'))
    open_prepared(copy)
  for torn in (text[:100], "", "[]", "null", '{"format": 2}', "[" * 100_000):
    path.write_text(torn)
    with pytest.raises(DataError, match="manifest.json is damaged: delete it"):
      open_prepared(copy)
  path.unlink()
  with pytest.raises(DataError, match="manifest.json is missing, without which its build"):
    open_prepared(copy)


def test_prepare_mends_what_is_damaged(base_config):
  first = prepare(base_config, log=str).prepared
  for damage in ("manifest.json", "tokenizer/tokenizer.json", "heldout_lengths.npy"):
    path = first.dir / damage if damage == "manifest.json" else first.root / damage
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    if "heldout" in damage:  # which is looked at where it is used
      manifests._checked.clear()
      with pytest.raises(DataError, match="heldout_lengths.npy is damaged"):
        open_prepared(base_config).heldout_lengths()
      (first.dir / "manifest.json").unlink()
    first = prepare(base_config, log=str).prepared
    assert open_prepared(base_config) == first
  (first.dir / "manifest.json").unlink()
  assert not prepare(base_config, log=str).already


@pytest.fixture
def base_config(byte_tokenizer, tmp_path):
  (tmp_path / "texts").mkdir()
  for i in range(40):
    (tmp_path / "texts" / f"{i}.txt").write_text("word " * (i + 1))
  source = SourceConfig(path=f"{tmp_path}/texts/*.txt", name="s")
  return DataConfig(str(tmp_path / "out"), (source,), TokenizerConfig(str(byte_tokenizer)), heldout_fraction=0.2)


def test_long_documents_are_read_in_part(base_config, tmp_path, monkeypatch):
  from jaxllm.data import shards

  (tmp_path / "texts" / "long.txt").write_bytes(os.urandom(1) + bytes(range(33, 120)) * 100)
  (tmp_path / "texts" / "a_long.txt").write_bytes(bytes(range(40, 90)) * 77)
  whole = prepare(base_config, log=str).prepared
  monkeypatch.setattr(shards, "PIECE_TOKENS", 64)
  pieces = prepare(dataclasses.replace(base_config, dir=f"{tmp_path}/pieces"), log=str).prepared
  read = []
  original = shards.TokenDocuments._record
  monkeypatch.setattr(shards.TokenDocuments, "_record", lambda self, n: read.append(n) or original(self, n))
  for split in ("train", "heldout"):
    left, right = (p.documents(p.sources[0], split) for p in (pieces, whole))
    assert len(left) == len(right)
    for index in range(len(left)):
      monkeypatch.setattr(shards, "PIECE_TOKENS", 1 << 16)
      record, framed = right.record(index), right.framed(index)
      monkeypatch.setattr(shards, "PIECE_TOKENS", 64)
      mine = left.record(index)
      assert (mine.id, mine.num_bytes) == (record.id, record.num_bytes) and (mine.tokens == record.tokens).all()
      for start, stop in (
        (0, 1),
        (0, 65),
        (1, 64),
        (60, 70),
        (len(framed) - 1, None),
        (len(framed) - 3, None),
        (0, None),
      ):
        start = max(start, 0)
        assert left.framed(index, start, stop).tolist() == framed[start:stop].tolist()
  index = max(range(len(left := pieces.documents(pieces.sources[0], "train"))), key=left._length)
  read.clear()
  left.framed(index, 700, 760)
  assert len(read) <= 2


def test_the_longest_document_says_so_early(base_config, tmp_path, monkeypatch):
  from jaxllm.data import readers

  monkeypatch.setattr(readers, "MOST_BYTES", 1000)
  (tmp_path / "texts" / "long.txt").write_bytes(b"x" * 1001)
  with pytest.raises(DataError, match=r"long.txt is a document of over .* split it"):
    prepare(base_config, log=str)

"""Every source kind, and the one-line error of each mistake."""

import codecs
import json
import os
import shutil
import sys

import numpy as np
import pytest

from jaxllm.base.errors import DataError
from jaxllm.data.config import SourceConfig
from jaxllm.data.sources import open_source, source_name, stdlib_sources

TEXTS = ["one", "zw\u00f6lf", "\u4e2d\u6587\n"]


def documents(**settings):
  return list(open_source(SourceConfig(**settings)).documents())


def fails(match, **settings):
  with pytest.raises(DataError, match=match) as caught:
    documents(**settings)
  assert "\n" not in str(caught.value)


@pytest.fixture
def tree(tmp_path):
  for name, data in {
    "b.txt": b"B",
    "a/x.txt": b"AX",
    "a/deep/y.txt": b"\xff\xfe",
    "skip/z.txt": b"Z",
  }.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
  return tmp_path


def test_text_globs(tree):
  found = [(d.id, d.data) for d in documents(path=f"{tree}/**/*.txt", name="s")]
  assert found == [
    ("s/a/deep/y.txt", b"\xff\xfe"),
    ("s/a/x.txt", b"AX"),
    ("s/b.txt", b"B"),
    ("s/skip/z.txt", b"Z"),
  ]
  # Two globs that both match a file read it once; a "!" glob leaves files out.
  found = documents(path=f"{tree}/a/**/*.txt, {tree}/a/x.txt,{tree}/skip/*,!{tree}/a/deep/**", name="s")
  assert [d.id for d in found] == ["s/a/x.txt", "s/skip/z.txt"]
  assert [d.id for d in documents(path=f"{tree}/**/*.txt,!**/skip/**", name="s")][-1] == "s/b.txt"
  assert len(documents(path=f"{tree}/**/*.txt", max_documents=2)) == 2


def test_ids_survive_moving_the_corpus(tree, tmp_path_factory):
  moved = tmp_path_factory.mktemp("moved") / "corpus"
  shutil.copytree(tree, moved)
  before = documents(path=f"{tree}/a/**/*.txt,{tree}/b.txt", name="s")
  after = documents(path=f"{moved}/a/**/*.txt,{moved}/b.txt", name="s")
  assert [(d.id, d.data) for d in after] == [(d.id, d.data) for d in before]


def test_file_name_that_is_not_utf8(tmp_path):
  name = os.fsencode(str(tmp_path)) + b"/caf\xe9.txt"
  with open(name, "wb") as file:
    file.write(b"data")
  [document] = documents(path=f"{tmp_path}/*.txt", name="s")
  assert document.id.encode("utf-8", "surrogateescape") == b"s/caf\xe9.txt"


def test_stamp_changes_with_the_files(tree):
  source = SourceConfig(path=f"{tree}/**/*.txt")
  before = open_source(source).stamp
  assert open_source(source).stamp == before
  (tree / "b.txt").write_bytes(b"longer")
  changed = open_source(source).stamp
  (tree / "new.txt").write_bytes(b"")
  assert len({before, changed, open_source(source).stamp}) == 3


@pytest.mark.parametrize(
  "path, name",
  [
    ("books/*.txt", "books"),
    ("a/tiny.txt", "tiny"),
    ("/x/y/**/*.py,/x/z/*.py", "x"),
    ("org/set:en", "org/set:en"),
  ],
)
def test_names_made_from_paths(path, name):
  kind = "huggingface" if ":" in path else "text"
  assert source_name(SourceConfig(kind=kind, path=path)) == name
  assert source_name(SourceConfig(kind=kind, path=path, name="mine")) == "mine"


def test_text_errors(tree):
  fails("without a path", path="")
  fails("file does not exist: .*none.txt", path=f"{tree}/none.txt")
  fails(r"glob matches no file: .*\.rs", path=f"{tree}/**/*.rs")
  fails("is a directory: write a glob", path=f"{tree}/a")
  fails("excludes every file", path=f"{tree}/b.txt,!**/*.txt")
  fails("names no file", path="!**/*.txt")


def test_jsonl(tmp_path):
  lines = [json.dumps({"text": text}) for text in TEXTS]
  data = "\n".join([*lines, "", json.dumps({"text": "\ud800"})]).encode() + b'\n{"text": "raw \xff"}\n'
  (tmp_path / "a.jsonl").write_bytes(data)
  found = documents(kind="jsonl", path=f"{tmp_path}/*.jsonl", name="j")
  assert [d.data for d in found] == [*(t.encode() for t in TEXTS), b"\xed\xa0\x80", b"raw \xff"]
  assert [d.id for d in found] == [f"j/a.jsonl:{line}" for line in (1, 2, 3, 5, 6)]


@pytest.mark.parametrize(
  "line, match",
  [
    ("{bad", r"a.jsonl:2: not a JSON object"),
    ("[1]", r"a.jsonl:2: a JSON object is needed, this is list"),
    ('{"body": "x", "n": 1}', r"a.jsonl:2: no field 'text'.*one of: body, n"),
    ('{"text": 3}', r"a.jsonl:2: field 'text' must be text, this is int"),
    ("[" * 100_000, r"a.jsonl:2: not a JSON object: maximum recursion depth"),
  ],
)
def test_jsonl_errors(tmp_path, line, match):
  (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
  fails(match, kind="jsonl", path=f"{tmp_path}/a.jsonl")


def test_jsonl_with_a_byte_order_mark(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "a"}\n{"text": "b"}\n')
  assert [d.data for d in documents(kind="jsonl", path=f"{tmp_path}/a.jsonl")] == [b"a", b"b"]


def test_parquet(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  for kind in (pa.string(), pa.large_string(), pa.binary()):
    values = [t.encode() for t in TEXTS] if kind == pa.binary() else TEXTS
    pq.write_table(pa.table({"body": pa.array(values, kind), "n": [1, 2, 3]}), tmp_path / "t.parquet")
    found = documents(kind="parquet", path=f"{tmp_path}/t.parquet", field="body")
    assert [d.data for d in found] == [t.encode() for t in TEXTS]
    assert found[2].id == "t/t.parquet:2"
  fails("no field 'text'.*body, n", kind="parquet", path=f"{tmp_path}/t.parquet")
  fails("not a readable Parquet", kind="parquet", path=f"{tmp_path}/t.parquet", field="n")
  pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
  fails("row 1: field 'text' must be text, this is NoneType", kind="parquet", path=f"{tmp_path}/null.parquet")
  (tmp_path / "bad.parquet").write_bytes(b"nonsense")
  fails("bad.parquet: not a readable Parquet", kind="parquet", path=f"{tmp_path}/bad.parquet")


def test_huggingface(tmp_path):
  datasets = pytest.importorskip("datasets")
  saved = datasets.Dataset.from_dict({"text": TEXTS})
  saved.save_to_disk(tmp_path / "saved")
  datasets.DatasetDict(train=saved).save_to_disk(tmp_path / "dict")
  for name in ("saved", "dict"):
    found = documents(kind="huggingface", path=f"{tmp_path}/{name}")
    assert [(d.id, d.data) for d in found] == [(f"{name}:{i}", text.encode()) for i, text in enumerate(TEXTS)]
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
  found = documents(kind="huggingface", path=f"{tmp_path}/folder")
  assert [d.data for d in found] == [t.encode() for t in TEXTS]
  fails("has no split 'test'; it has: train", kind="huggingface", path=f"{tmp_path}/dict", split="test")
  fails("row 0: no field 'body'", kind="huggingface", path=f"{tmp_path}/saved", field="body")


def test_huggingface_unknown_name(monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
  fails("cannot open Hugging Face dataset 'no/such:en'", kind="huggingface", path="no/such:en")


@pytest.fixture
def tfds_dir(tmp_path):
  from jaxllm.data.shards import Record, ShardWriter, shard_path, write_metadata

  path = shard_path(tmp_path, "toy", "train", 0, 1)
  path.parent.mkdir(parents=True)
  shard = ShardWriter(path)
  for i in range(5):
    shard.write(Record(f"r{i}".encode(), i, np.arange(i, dtype=np.int32)))
  shard.close()
  write_metadata(tmp_path, "toy", {"train": ([5], 100)})
  return tmp_path / "toy" / "1.0.0"


def test_tfds_prepared_directory(tfds_dir):
  found = documents(kind="tfds", path=str(tfds_dir), field="id", name="toy")
  assert [(d.id, d.data) for d in found] == [(f"toy:{i}", f"r{i}".encode()) for i in range(5)]
  assert "tensorflow" not in sys.modules


def test_tfds_name(tfds_dir, monkeypatch):
  """A registered name that is prepared under TFDS_DATA_DIR."""
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(str(tfds_dir))
  asked = []
  monkeypatch.setattr(tfds, "builder", lambda name, **_: asked.append(name) or builder)
  monkeypatch.setattr(builder, "download_and_prepare", lambda: None)
  assert len(documents(kind="tfds", path="toy", field="id")) == 5
  assert asked == ["toy"]


def test_tfds_errors(tfds_dir):
  fails("cannot open TFDS dataset 'no_such_dataset'", kind="tfds", path="no_such_dataset")
  fails("split 'test'", kind="tfds", path=str(tfds_dir), split="test")
  fails("field 'tokens' must be text", kind="tfds", path=str(tfds_dir), field="tokens")


def test_missing_extra(tmp_path, monkeypatch):
  (tmp_path / "t.parquet").write_bytes(b"")
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  monkeypatch.setitem(sys.modules, "datasets", None)
  fails(r"pyarrow is not installed: pip install 'jaxllm\[data\]'", kind="parquet", path=f"{tmp_path}/t.parquet")
  fails(r"datasets is not installed: pip install 'jaxllm\[data\]'", kind="huggingface", path="x")


def test_stdlib_is_the_standard_library():
  source = open_source(stdlib_sources())
  ids = {document.id for document in source.documents()}
  assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= ids
  assert len(ids) > 500
  assert not any("site-packages" in i or "__pycache__" in i for i in ids)


def test_json_lists_are_rows_by_line(tmp_path):
  path = tmp_path / "t.json"
  path.write_text('\n[\n {"text": "a\\n]"},\n\n {"text":\n "b"}, {"text": "c"}\n]\n')
  found = documents(kind="json", path=str(path), name="j")
  assert [(d.id, d.data) for d in found] == [("j/t.json:0", b"a\n]"), ("j/t.json:1", b"b"), ("j/t.json:2", b"c")]
  assert [d.where for d in found] == [f"{path}:{line}" for line in (3, 5, 6)]
  path.write_text('[{"text": "a"},\n{"text" "b"}]')
  with pytest.raises(DataError, match=r"t\.json:2: not a JSON list of objects: Expecting ':' delimiter"):
    documents(kind="json", path=str(path))
  path.write_bytes(codecs.BOM_UTF8 + b'[{"text": "a"}]')
  assert [d.data for d in documents(kind="json", path=str(path))] == [b"a"]
  for text in ('[{"text": "a"} {"text": "b"}]', '[{"text": "a"},, {}]', '[, {"text": "a"}]', '[{"text": "a"},]'):
    path.write_text(text)
    with pytest.raises(DataError, match=r"t\.json:1: not a JSON list of objects"):
      documents(kind="json", path=str(path))
  path.write_text("[" * 100_000)
  with pytest.raises(DataError, match=r"t\.json:1: not a JSON list of objects: maximum recursion depth"):
    documents(kind="json", path=str(path))
  path.write_text('[{"text": "a"}]\n [{"n": 1}]')
  with pytest.raises(DataError, match=r"""t\.json:2: '\[{"n": 1}\]' stands behind the JSON list's end; remove it"""):
    documents(kind="json", path=str(path))
  for text in ('{"rows": [{"text": "a"}]}', ""):
    path.write_text(text)
    with pytest.raises(DataError, match=r"t\.json:1: not a JSON list of objects; one object a line is kind 'jsonl'"):
      documents(kind="json", path=str(path))
  path.write_text('[{"text": "a"}, {"text": 5}, {"text": "c"}]')
  source = open_source(SourceConfig(kind="json", path=str(path)), on_bad_row="skip")
  assert [d.data for d in source.documents()] == [b"a", b"c"]
  assert source.skipped == [
    f"{path}:1: field 'text' must be text, this is int (5); write it as a string, or set data.on_bad_row to 'skip'"
  ]

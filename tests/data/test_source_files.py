"""Files as people have them: compressed, with marks, in other encodings, with nulls, odd names, huge lines."""

import bz2
import codecs
import gzip
import json
import lzma
import os

import pytest

from jaxllm.base.errors import DataError
from jaxllm.data import readers, streams, units
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.prepare import prepare
from jaxllm.data.sources import open_source, source_name

TEXTS = ["one", "zw\u00f6lf \u4e2d\u6587", "three\nlines\r\nhere", "four \U0001f600"]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)


def texts(**settings):
  return [document.data.decode() for document in open_source(SourceConfig(**settings)).documents()]


def zstd(data: bytes) -> bytes:
  pyarrow = pytest.importorskip("pyarrow")
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(data)
  return sink.getvalue().to_pybytes()


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files(tmp_path, suffix):
  packed = PACKERS[suffix](LINES.encode())
  (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed)
  (tmp_path / f"t.txt.{suffix}").write_bytes(PACKERS[suffix](b"plain\r\ntext"))
  (tmp_path / f"l.json.{suffix}").write_bytes(PACKERS[suffix](json.dumps([{"text": t} for t in TEXTS]).encode()))
  path = f"{tmp_path}/a.jsonl.{suffix}"
  assert texts(kind="jsonl", path=path) == TEXTS == texts(kind="json", path=f"{tmp_path}/l.json.{suffix}")
  assert texts(path=f"{tmp_path}/t.txt.{suffix}") == ["plain\r\ntext"]
  assert source_name(SourceConfig(path=path)) == "a"
  assert [d.id for d in open_source(SourceConfig(kind="jsonl", path=path)).documents()][1] == f"a/a.jsonl.{suffix}:2"
  for damaged in (packed[: len(packed) // 2], b"no such format at all", packed[:-3]):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(damaged)
    with pytest.raises(DataError, match=rf"a.jsonl.{suffix}.* (is damaged or cut short|not a JSON object)") as caught:
      texts(kind="jsonl", path=path)
    assert "\n" not in str(caught.value)


def test_two_gzip_members_are_one_file(tmp_path):
  half = LINES.index("\n") + 1
  (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:half].encode()) + gzip.compress(LINES[half:].encode()))
  assert texts(kind="jsonl", path=f"{tmp_path}/a.jsonl.gz") == TEXTS


def test_no_reader_of_zstd(tmp_path, monkeypatch):
  import sys

  for name in ("compression", "zstandard", "pyarrow"):
    monkeypatch.setitem(sys.modules, name, None)
  (tmp_path / "a.jsonl.zst").write_bytes(b"")
  with pytest.raises(DataError, match="a.jsonl.zst needs a reader of zstd: pip install zstandard"):
    texts(kind="jsonl", path=f"{tmp_path}/a.jsonl.zst")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be with mark"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "text"])
def test_byte_order_marks(tmp_path, encoding, kind):
  text = {"jsonl": LINES, "json": json.dumps([{"text": t} for t in TEXTS], ensure_ascii=False), "text": TEXTS[1]}[kind]
  data = codecs.BOM_UTF16_BE + text.encode("utf-16-be") if "mark" in encoding else text.encode(encoding)
  (tmp_path / "a.x").write_bytes(data)
  source = open_source(SourceConfig(kind=kind, path=f"{tmp_path}/a.x"))
  found = [document.data.decode() for document in source.documents()]
  assert found == (TEXTS[1:2] if kind == "text" else TEXTS)
  assert list(source.marks) == [encoding.split("-be")[0]]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gbk", "utf-16-le", "shift_jis"])
def test_a_named_encoding(tmp_path, encoding):
  words = [text.encode(encoding, "ignore").decode(encoding) for text in TEXTS]
  (tmp_path / "a.jsonl").write_bytes(
    "".join(json.dumps({"text": w}, ensure_ascii=False) + "\n" for w in words).encode(encoding)
  )
  assert texts(kind="jsonl", path=f"{tmp_path}/a.jsonl", encoding=encoding) == words


def test_wrong_encodings(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfd\x81")
  with pytest.raises(DataError, match=r"a.txt is not in the encoding ascii: .*; set the source's `encoding`"):
    texts(path=f"{tmp_path}/a.txt", encoding="ascii")
  for encoding in ("klingon", "hex"):  # the latter is a codec, and none of text
    with pytest.raises(DataError, match=f"encoding is '{encoding}', which Python does not know"):
      texts(path=f"{tmp_path}/a.txt", encoding=encoding)


def test_utf16_is_said(tmp_path, byte_tokenizer):
  for i in range(3):
    (tmp_path / f"{i}.txt").write_bytes("some words".encode("utf-16"))
  said = []
  config = DataConfig(
    f"{tmp_path}/out", (SourceConfig(path=f"{tmp_path}/*.txt", name="s"),), TokenizerConfig(str(byte_tokenizer))
  )
  prepare(config, log=said.append)
  assert "warning: 3 files of 's' are UTF-16 by their byte order mark, and read as such" in said


@pytest.mark.parametrize("row", [{"text": None}, {"other": 1}])
def test_nulls(tmp_path, row, byte_tokenizer):
  rows = [{"text": "a"}, row, {"text": "c"}]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  settings = dict(kind="jsonl", path=f"{tmp_path}/a.jsonl")
  with pytest.raises(DataError, match=r"a.jsonl:2: (field 'text' must be text, this is NoneType|no field 'text')"):
    texts(**settings)
  assert texts(**settings, on_null="keep") == ["a", "", "c"]
  source = open_source(SourceConfig(**settings, on_null="skip"))
  assert [(d.id, d.data) for d in source.documents()] == [("a/a.jsonl:1", b"a"), ("a/a.jsonl:3", b"c")]
  assert source.nulls == 1
  config = DataConfig(
    f"{tmp_path}/out", (SourceConfig(**settings, on_null="skip"),), TokenizerConfig(str(byte_tokenizer))
  )
  assert prepare(config, log=str).prepared.sources[0].null_rows == 1
  two = [{"source": "a", "target": "b"}, {"source": None, "target": "d"}]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in two))
  assert texts(**settings, fields=("source", "target"), on_null="skip") == ['["a", "b"]']
  assert texts(**settings, fields=("source", "target"), on_null="keep") == ['["a", "b"]', '["", "d"]']


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "binary", "binary_view"])
def test_arrow_kinds_of_text(tmp_path, kind):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  values = [t.encode() for t in TEXTS] if kind.startswith("binary") else TEXTS
  array = pa.array(values).dictionary_encode() if kind == "dictionary" else pa.array(values, getattr(pa, kind)())
  pq.write_table(pa.table({"text": array, "label": [0, 1, 0, 1]}), tmp_path / "a.parquet")
  assert texts(kind="parquet", path=f"{tmp_path}/a.parquet") == TEXTS
  found = texts(kind="parquet", path=f"{tmp_path}/a.parquet", fields=("text", "label"))
  assert json.loads(found[1]) == [TEXTS[1], 1]


def test_row_groups_are_units(tmp_path, monkeypatch):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  monkeypatch.setattr(units, "_SMALLEST", 2000)
  rows = [f"row {i} " * (i % 50) + "." for i in range(300)]
  pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=7)
  pq.write_table(pa.table({"text": rows[:1]}), tmp_path / "b.parquet", row_group_size=1)
  source = open_source(SourceConfig(kind="parquet", path=f"{tmp_path}/*.parquet", name="p"))
  assert len(source.units) > 5
  found = [(d.id, d.data.decode()) for unit in source.units for d in source.read(unit)]
  assert found == [(f"p/a.parquet:{i}", row) for i, row in enumerate(rows)] + [("p/b.parquet:0", rows[0])]
  assert [(d.id, d.data.decode()) for d in source.documents()] == found


def test_bytes_ranges_hold_each_line_once(tmp_path, monkeypatch):
  """Whatever stands at the edges: line ends, blank lines, lines over several ranges."""
  for size in (1, 2, 3, 5, 8, 13, 50, 1000):
    monkeypatch.setattr(units, "_SMALLEST", size)
    for ends in ("\n", "\r\n", "\n\n"):
      for last in ("", ends):
        lines = [json.dumps({"text": "x" * n}) for n in (0, 1, 30, 2, 0, 300, 5)]
        (tmp_path / "a.jsonl").write_text(ends.join(lines) + last, newline="")
        source = open_source(SourceConfig(kind="jsonl", path=f"{tmp_path}/a.jsonl", name="j"))
        step = 2 if ends == "\n\n" else 1
        expected = [(f"j/a.jsonl:{1 + step * i}", json.loads(line)["text"]) for i, line in enumerate(lines)]
        assert [(d.id, d.data.decode()) for d in source.documents()] == expected
        assert len(source.units) == 1 or all(unit.size <= size for unit in source.units)


def test_names_with_commas_and_brackets(tmp_path, monkeypatch):
  folder = tmp_path / "my, data [v1]"
  folder.mkdir()
  for name in ("a,b.txt", "c.txt", "[x].txt", "x.txt"):
    (folder / name).write_text(name)
  assert texts(path=f"{folder}/a,b.txt") == ["a,b.txt"]
  assert texts(path=f"{folder}/[x].txt") == ["[x].txt"]
  assert texts(path=f"{folder}/a,b.txt,{folder}/c.txt".replace("my, data", "my, data")) == ["a,b.txt", "c.txt"]
  plain = tmp_path / "plain [v1]"
  folder.rename(plain)
  assert texts(path=f"{plain}/*.txt,!{plain}/?.txt,!{plain}/[[]x].txt") == ["a,b.txt"]
  monkeypatch.chdir(plain)
  assert texts(path="*.txt,!c.txt,!x.txt") == ["[x].txt", "a,b.txt"]
  monkeypatch.chdir(tmp_path)
  source = open_source(SourceConfig(path="plain [v1]/*.txt,!plain [v1]/[ax]*"))
  assert [d.id for d in source.documents()] == ["plain [v1]/[x].txt", "plain [v1]/c.txt"]
  assert texts(path="plain [v1]/[!a-c]*.txt,!**/[[]*") == ["x.txt"]


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
  monkeypatch.setattr(readers, "MOST_BYTES", 100)
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "b" * 200 + '"}\n')
  with pytest.raises(DataError, match=r"a.jsonl:2: a line of over .* MiB; split it"):
    texts(kind="jsonl", path=f"{tmp_path}/a.jsonl")
  assert streams.MOST_BYTES == 1 << 30


def test_a_streamed_data_set(tmp_path):
  pytest.importorskip("datasets")
  (tmp_path / "folder").mkdir()
  for part in range(3):
    rows = "".join(json.dumps({"text": f"{part} {t}"}) + "\n" for t in TEXTS)
    (tmp_path / "folder" / f"train-{part}.jsonl").write_text(rows)
  settings = dict(kind="huggingface", path=f"{tmp_path}/folder", name="hub")
  whole, source = open_source(SourceConfig(**settings)), open_source(SourceConfig(**settings, streaming=True))
  documents = list(source.documents())
  assert [d.data for d in documents] == [d.data for d in whole.documents()]
  assert len(source.units) == 3 and [d.id for d in documents][4] == "hub:1:0"
  assert texts(**settings, streaming=True, max_documents=2) == [f"0 {t}" for t in TEXTS[:2]]
  with pytest.raises(DataError, match="has streaming, which is for kind 'huggingface'"):
    open_source(SourceConfig(path="x", streaming=True))


def test_a_pipe_is_no_source(tmp_path):
  """It can be read once; and it is there, so nobody should be told that it is not."""
  os.mkfifo(tmp_path / "pipe.jsonl")
  with pytest.raises(DataError, match="is a pipe, socket or device"):
    open_source(SourceConfig(kind="jsonl", path=f"{tmp_path}/pipe.jsonl", field="text"))

"""GGUF headers: against the gguf package, and what damaged and malicious ones do."""

import resource
import struct
import tracemalloc
from pathlib import Path

import gguf
import gguf_models
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxllm.base.errors import CheckpointError, UserError
from jaxllm.interop.gguf import read_gguf, write_gguf
from jaxllm.interop.gguf.header import encode_header, read_header, read_headers

METADATA = {
  "general.architecture": "llama",
  "whole": 7,
  "real": 1e-05,
  "yes": True,
  "text": "héllo",
  "names": ["a", "", "世界"],
  "scores": np.array([0.5, -1], np.float32),
  "types": np.array([1, 6], np.int32),
}


def test_the_gguf_package_reads_what_is_written(tmp_path):
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  data = encode_header(METADATA, [("x", "F32", (3, 4), 0)]) + x.tobytes()
  (tmp_path / "x.gguf").write_bytes(data)
  reader = gguf.GGUFReader(tmp_path / "x.gguf")
  assert len(data) - reader.data_offset == x.nbytes
  for key, value in METADATA.items():
    got = reader.fields[key].contents()
    np.testing.assert_array_equal(
      np.float32(got) if key == "real" else got, np.float32(value) if key == "real" else value
    )
  np.testing.assert_array_equal(reader.tensors[0].data, x)


def test_what_the_gguf_package_writes_is_read(tmp_path):
  writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
  writer.add_uint8("u8", 200)
  writer.add_int16("i16", -3)
  writer.add_uint64("u64", 1 << 40)
  writer.add_float64("f64", 0.1)
  writer.add_bool("no", False)
  writer.add_array("words", ["x", "yz"])
  writer.add_custom_alignment(64)
  x, y = np.arange(5, dtype=np.float16), np.arange(64, dtype=np.float32).reshape(2, 32)
  writer.add_tensor("x", x)
  writer.add_tensor(
    "y", gguf.quants.quantize(y, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
  )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  header = read_header(tmp_path / "x.gguf")
  want = {"u8": 200, "i16": -3, "u64": 1 << 40, "f64": 0.1, "no": False, "words": ["x", "yz"]}
  assert {key: header.metadata[key] for key in want} == want
  places = {tensor.name: tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
  assert {name: (i.type, i.shape, i.start) for name, i in header.tensors.items()} == {
    "x": ("F16", (5,), places["x"]),
    "y": ("Q8_0", (2, 32), places["y"]),
  }


def header(*tensors, entries=b"", count=0, version=3, tensor_count=None):
  """A header from raw parts; a tensor is (name, dimensions innermost first, type, offset)."""
  data = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if tensor_count is None else tensor_count, count) + entries
  for name, shape, kind, offset in tensors:
    data += struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    data += struct.pack("<IQ", kind, offset)
  return data.ljust(-(-len(data) // 32) * 32, b"\0")


def entry(key, kind, value):
  return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


HUGE = (1 << 64) - 1
F32, Q4_0 = 0, 2
BAD = {
  "empty": (b"", "ends within its first bytes"),
  "other": (b"PK\3\4" + bytes(64), 'does not begin with "GGUF"'),
  "version": (header(version=1), "version 1 is unknown"),
  "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
  "entries": (header(count=HUGE), f"{HUGE} metadata entries"),
  "tensors": (header(tensor_count=HUGE), f"{HUGE} tensors"),
  "key": (header(count=1, entries=struct.pack("<Q", 1 << 40) + bytes(16)), "a metadata key is"),
  "string": (header(count=1, entries=entry("k", 8, struct.pack("<Q", 1 << 62))), "within the metadata 'k'"),
  "array": (header(count=1, entries=entry("k", 9, struct.pack("<IQ", 4, 1 << 62))), "within the metadata 'k'"),
  "strings": (header(count=1, entries=entry("k", 9, struct.pack("<IQ", 8, 1 << 61))), "within the metadata 'k'"),
  "nested": (header(count=1, entries=entry("k", 9, struct.pack("<IQ", 9, 1))), "array of the unknown type 9"),
  "type": (header(count=1, entries=entry("k", 77, bytes(8))), "unknown type 77"),
  "utf8": (header(count=1, entries=entry("k", 8, struct.pack("<Q", 1) + b"\xff")), "is not UTF-8"),
  "key twice": (header(count=2, entries=2 * entry("k", 0, b"\1")), "the metadata 'k' twice"),
  "alignment": (header(count=1, entries=entry("general.alignment", 4, struct.pack("<I", 3))), "alignment is 3"),
  "name": (header(("n" * 200, (4,), F32, 0)) + bytes(64), "at most 128"),
  "dimensions": (header(("x", (1,) * 9, F32, 0)) + bytes(64), "has 9 dimensions"),
  "no dimension": (header(("x", (), F32, 0)) + bytes(64), "has 0 dimensions"),
  "zero": (header(("x", (0, 4), F32, 0)) + bytes(64), "is empty"),
  "overflow": (header(("x", (1 << 62, 1 << 62), F32, 0)) + bytes(64), "larger than the file"),
  "tensor type": (header(("x", (4,), 250, 0)) + bytes(64), "unknown type 250"),
  "block": (header(("x", (33,), Q4_0, 0)) + bytes(64), "not whole blocks of 32"),
  "beyond": (header(("x", (8,), F32, 64)) + bytes(64), "before the tensor 'x' does"),
  "far beyond": (header(("x", (8,), F32, HUGE - 31)) + bytes(64), "before the tensor 'x' does"),
  "cut": (header(("x", (16,), F32, 0)) + bytes(63), "before the tensor 'x' does"),
  "misaligned": (header(("x", (4,), F32, 4)) + bytes(64), "not aligned"),
  "overlap": (header(("x", (16,), F32, 0), ("y", (4,), F32, 32)) + bytes(64), "'x' and 'y' overlap"),
  "same place": (header(("x", (4,), F32, 0), ("y", (4,), F32, 0)) + bytes(64), "overlap"),
  "twice": (header(("x", (4,), F32, 0), ("x", (4,), F32, 32)) + bytes(64), "the tensor 'x' twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_headers(tmp_path, name):
  data, words = BAD[name]
  (tmp_path / "x.gguf").write_bytes(data)
  with pytest.raises(CheckpointError) as error:
    read_header(tmp_path / "x.gguf")
  assert words in str(error.value) and "\n" not in str(error.value)


def test_the_raw_parts_make_a_good_header(tmp_path):
  """Else the cases above could fail for another reason."""
  raw = header(("x", (4,), F32, 0), ("y", (4,), F32, 32), count=1, entries=entry("k", 4, struct.pack("<I", 5)))
  (tmp_path / "x.gguf").write_bytes(raw + bytes(64))
  found = read_header(tmp_path / "x.gguf")
  assert found.metadata == {"k": 5} and [t.shape for t in found.tensors.values()] == [(4,), (4,)]


def test_split_files(tmp_path):
  for part, name in ((1, "x"), (2, "y")):
    metadata = {"split.no": part - 1, "split.count": 2} | ({"general.name": "both"} if part == 1 else {})
    data = encode_header(metadata, [(name, "F32", (8,), 0)]) + np.full(8, part, np.float32).tobytes()
    (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(data)
  found = read_headers(tmp_path / "m-00001-of-00002.gguf")
  assert {name: info.path.name for name, info in found.tensors.items()} == {
    "x": "m-00001-of-00002.gguf",
    "y": "m-00002-of-00002.gguf",
  }
  with pytest.raises(CheckpointError, match="part 2 of 2; give the first"):
    read_headers(tmp_path / "m-00002-of-00002.gguf")
  (tmp_path / "m-00002-of-00002.gguf").unlink()
  with pytest.raises(CheckpointError, match="00002-of-00002.gguf: there is no such file"):
    read_headers(tmp_path / "m-00001-of-00002.gguf")
  (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "renamed.gguf")
  with pytest.raises(CheckpointError, match="keep their names"):
    read_headers(tmp_path / "renamed.gguf")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory, sentencepiece_bpe):
  path = tmp_path_factory.mktemp("fuzz") / "small.gguf"
  config, tensors = gguf_models.checkpoint("llama-llama3")
  write_gguf(path, config, tensors, sentencepiece_bpe, dtype="q8_0")
  return SmallFile(path.read_bytes())


class SmallFile(bytes):
  def __repr__(self):  # hypothesis prints the arguments of what fails
    return "small_file"


def use(path):
  """Everything that a user of the file would do with it."""
  checkpoint = read_gguf(path)
  for tensor in checkpoint.tensors.values():
    assert tensor.read().shape == tensor.shape
  checkpoint.tokenizer()
  return checkpoint.generation


FUZZ = hypothesis.settings(
  max_examples=150, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True
)


def attempt(path, data):
  path.write_bytes(data)
  tracemalloc.start()
  limits = resource.getrlimit(resource.RLIMIT_AS)
  room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (1 << 30)
  resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))  # what C++ would allocate, too
  try:
    with np.errstate(all="ignore"):
      use(path)
  except UserError as error:
    assert "\n" not in str(error)
  finally:
    resource.setrlimit(resource.RLIMIT_AS, limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak < 30 * len(data) + (1 << 22)


@FUZZ
@hypothesis.given(data=st.data())
def test_damaged_bytes(small_file, tmp_path_factory, data):
  path = tmp_path_factory.getbasetemp() / "damaged.gguf"
  header_end = len(encode_header(read_header_of(small_file, path), []))
  damaged = bytearray(small_file)
  for _ in range(data.draw(st.integers(1, 4))):
    at = data.draw(st.integers(0, header_end))
    patch = data.draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(EXTREMES)))
    damaged[at : at + len(patch)] = patch
  if data.draw(st.booleans()):
    del damaged[data.draw(st.integers(0, len(damaged))) :]
  attempt(path, bytes(damaged))


EXTREMES = [struct.pack("<Q", n) for n in (0, 1, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)]


def read_header_of(data, path):
  path.write_bytes(data)
  return read_header(path).metadata


WILD = st.sampled_from([0, 1, 2, 3, 31, 32, 33, 2**16, 2**28, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1])


@FUZZ
@hypothesis.given(data=st.data())
def test_invented_headers(tmp_path_factory, data):
  tensors = data.draw(
    st.lists(
      st.tuples(
        st.sampled_from(["token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight", "rope_freqs.weight", "x"]),
        st.lists(WILD, max_size=6),
        st.integers(0, 45),
        WILD,
      ),
      max_size=5,
    )
  )
  keys = (
    "block_count",
    "embedding_length",
    "attention.head_count",
    "context_length",
    "feed_forward_length",
    "rope.freq_base",
  )
  entries = entry("general.architecture", 8, struct.pack("<Q", 5) + b"llama")
  for key in keys:
    entries += entry(f"llama.{key}", 10, struct.pack("<Q", data.draw(WILD)))
  count = data.draw(st.sampled_from([len(keys) + 1, len(keys), 2**63]))
  raw = header(*tensors, entries=entries, count=count) + bytes(data.draw(st.integers(0, 4096)))
  attempt(tmp_path_factory.getbasetemp() / "invented.gguf", raw)


@FUZZ
@hypothesis.given(data=st.data())
def test_senseless_metadata(small_file, tmp_path_factory, data):
  """Well-formed files whose metadata contradict each other and the tensors."""
  path = tmp_path_factory.getbasetemp() / "senseless.gguf"
  path.write_bytes(small_file)
  good = read_header(path)
  base = min(info.start for info in good.tensors.values())
  metadata = dict(good.metadata)
  value = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 2**24, 2**31 - 1, 2**31, 2**32 - 1]),
    st.floats(width=32),
    st.booleans(),
    st.sampled_from(["", "gpt2", "t5", "yarn", "default", "x"]),
    st.just(["a", "a"]),
    st.just(np.array([1, 2], np.int32)),
    st.just(np.array([], np.float32)),
  )
  for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3, unique=True)):
    if data.draw(st.booleans()):
      metadata[key] = data.draw(value)
    else:
      del metadata[key]
  if "general.alignment" in metadata:
    return
  infos = [(name, info.type, info.shape, info.start - base) for name, info in good.tensors.items()]
  attempt(path, encode_header(metadata, infos) + small_file[base:])

"""The safetensors reader and writer against the format's own library, and against hostile files."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.safetensors import DTYPES, read_safetensors, read_sharded, write_safetensors, write_sharded
from jaxllm.interop.tensors import cast, from_parts, in_memory

oracle = pytest.importorskip("safetensors.numpy")


def arrays():
  rng = np.random.default_rng(0)
  kinds = [np.dtype(k) for k in ["d", "f", "e", "q", "i", "h", "b", "Q", "I", "H", "B", "?"]]
  some = {f"of.{dtype}": rng.integers(0, 2, (3, 2)).astype(dtype) for dtype in kinds}
  some |= {"bf16": rng.standard_normal((4, 3, 5)).astype(ml_dtypes.bfloat16), "é": np.zeros((0, 3), np.float32)}
  return some | {"scalar": np.array(2.5, np.float32), "bytes": np.arange(3, dtype=np.uint8)}


def test_the_library_reads_what_is_written_and_the_reverse(tmp_path):
  want = arrays()
  write_safetensors(tmp_path / "ours.safetensors", in_memory(want))
  theirs = oracle.load_file(tmp_path / "ours.safetensors")
  oracle.save_file(want, tmp_path / "theirs.safetensors", {"format": "pt"})
  ours = read_safetensors(tmp_path / "theirs.safetensors")
  assert theirs.keys() == ours.keys() == want.keys()
  for name, x in want.items():
    for got in (theirs[name], ours[name].read()):
      assert (got.dtype, got.shape) == (x.dtype, x.shape) and got.tobytes() == x.tobytes()
  np.testing.assert_array_equal(ours["bf16"].part((2, 1)), want["bf16"][2, 1])


def test_float8_comes_back_bit_for_bit(tmp_path):
  codes = np.arange(256, dtype=np.uint8)
  want = {name: codes.view(dtype) for name, dtype in DTYPES.items() if name.startswith("F8")}
  write_safetensors(tmp_path / "f.safetensors", in_memory(want))
  for name, tensor in read_safetensors(tmp_path / "f.safetensors").items():
    assert tensor.dtype == DTYPES[name]
    np.testing.assert_array_equal(tensor.read().view(np.uint8), codes)


def test_shards_are_cut_between_tensors_and_written_part_by_part(tmp_path):
  want = {f"t{i}": np.full((2, 50), i, np.float32) for i in range(5)}  # 400 bytes each
  tensors = {name: from_parts(x.shape, x.dtype, 1, lambda i, x=x: x[i]) for name, x in want.items()}
  write_sharded(tmp_path, tensors, max_shard_bytes=800)
  index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == 2000
  assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
  assert len(oracle.load_file(tmp_path / "model-00001-of-00003.safetensors")) == 2
  got = read_sharded(tmp_path)
  assert list(got) == list(want)
  for name, x in want.items():
    np.testing.assert_array_equal(got[name].read(), x)


def test_cast_says_what_does_not_fit():
  tensors = in_memory({"a": np.array([1.0, 7e4], np.float32), "b": np.array([np.inf, 1.0], np.float32)})
  assert cast(tensors, np.dtype(ml_dtypes.bfloat16))["a"].read().dtype == ml_dtypes.bfloat16
  half = cast(tensors, np.dtype(np.float16))
  assert half["b"].read().tolist() == [np.inf, 1.0]
  with pytest.raises(CheckpointError, match="a holds numbers that are too large for float16"):
    half["a"].read()


def file_of(path, header, data=b"", length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
  return path


def f32(shape, start, stop):
  return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
  "header, data, length, message",
  [
    ({}, b"", 2**63, "should take"),
    ({}, b"", 3, "should take"),
    (b"{" * 10, b"", None, "not JSON"),
    (b'{"a":' * 100_000, b"", None, "not JSON"),
    (b'{"a": 1, "a": 2}', b"", None, "twice"),
    (b"[]", b"", None, "not a JSON object"),
    ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    ({"a": 3}, b"", None, "entry of 'a'"),
    ({"a": f32([2], 0, 8) | {"dtype": "F7"}}, b"x" * 8, None, "'F7'"),
    ({"a": f32([2], 0, 4)}, b"x" * 4, None, "does not take 4 bytes"),
    ({"a": f32([2**62, 2**62], 0, 4)}, b"x" * 4, None, "no possible shape"),
    ({"a": f32([-1, -2], 0, 8)}, b"x" * 8, None, "no possible shape"),
    ({"a": f32([True], 0, 4)}, b"x" * 4, None, "no possible shape"),
    ({"a": f32([0, 2**62], 0, 0)}, b"", None, "no possible shape"),
    ({"a": f32([0], 8, 8)}, b"x" * 8, None, "starts at byte 8"),
    ({"a": f32([1], 0, 4), "b": f32([1], 0, 4)}, b"x" * 4, None, "tensor b starts at byte 0"),
    ({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, b"x" * 12, None, "tensor b starts at byte 8"),
    ({"a": f32([2], 0, 8)}, b"x" * 4, None, "end at byte"),
    ({"a": f32([1], 0, 4)}, b"x" * 8, None, "end at byte"),
    ({"a\n": f32([1], 0, 4)}, b"x" * 4, None, r"'a\\n'"),
  ],
)
def test_a_hostile_header_is_refused_in_one_line(tmp_path, header, data, length, message):
  with pytest.raises(CheckpointError, match=message) as raised:
    read_safetensors(file_of(tmp_path / "x.safetensors", header, data, length))
  assert "\n" not in str(raised.value)


def test_a_huge_header_is_not_read(tmp_path):
  path = tmp_path / "x.safetensors"
  with path.open("wb") as file:
    file.write((10**12).to_bytes(8, "little"))
    file.truncate(10**12 + 8)  # sparse: as long as it says
  with pytest.raises(CheckpointError, match="over the limit"):
    read_safetensors(path)


def test_a_file_cut_after_it_was_opened(tmp_path):
  write_safetensors(tmp_path / "x.safetensors", in_memory({"a": np.zeros(100)}))
  tensor = read_safetensors(tmp_path / "x.safetensors")["a"]
  with (tmp_path / "x.safetensors").open("r+b") as file:
    file.truncate(300)
  with pytest.raises(CheckpointError, match="ends within the tensor a"):
    tensor.read()


json_values = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
  max_leaves=5,
)
sizes = st.integers(0, 12) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30, -1])
entries = st.fixed_dictionaries(
  {
    "dtype": st.sampled_from([*DTYPES, "F4"]),
    "shape": st.lists(sizes, max_size=3) | json_values,
    "data_offsets": st.lists(sizes, min_size=2, max_size=2) | json_values,
  }
)
headers = st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3)
flips = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4)


def reads_or_refuses(path):
  tracemalloc.start()
  try:
    for tensor in read_safetensors(path).values():
      assert tensor.read().shape == tensor.shape
  except CheckpointError as error:
    assert "\n" not in str(error)
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak < 2e6


@settings(max_examples=150, deadline=None)
@given(header=headers, data=st.binary(max_size=40))
def test_fuzzed_headers(tmp_path_factory, header, data):
  reads_or_refuses(file_of(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data))


@settings(max_examples=150, deadline=None)
@given(flips=flips, cut=st.integers(0, 500))
def test_flipped_bytes(tmp_path_factory, flips, cut):
  path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
  write_safetensors(path, in_memory({"a": np.arange(6.0), "bb": np.ones((2, 3), np.float32)}))
  data = bytearray(path.read_bytes())
  for place, bits in flips:
    data[place % len(data)] ^= bits
  path.write_bytes(data[: len(data) - cut % 50])
  reads_or_refuses(path)


@pytest.mark.parametrize(
  "index, message",
  [
    ("{", "cannot read"),
    ('{"weight_map": ["a"]}', "key weight_map is"),
    ('{"weight_map": {"a": ["b"]}}', "weight_map.a is"),
    ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "cannot read"),
    ('{"weight_map": {"a": "gone.safetensors"}}', "lacks the shard gone.safetensors"),
    ('{"weight_map": {"b": "one.safetensors"}}', "lacks the tensor b"),
    ('{"weight_map": {"a": "../one.safetensors"}}', "not a .safetensors file beside it"),
    ('{"weight_map": {"a": "/one.safetensors"}}', "not a .safetensors file beside it"),
    ('{"weight_map": {"a": 3}}', "weight_map.a is 3"),
  ],
)
def test_a_bad_index_is_refused(tmp_path, index, message):
  folder = tmp_path / "model"
  folder.mkdir()
  for place in (tmp_path, folder):
    write_safetensors(place / "one.safetensors", in_memory({"a": np.zeros(1)}))
  (folder / "model.safetensors.index.json").write_text(index)
  with pytest.raises(CheckpointError, match=message):
    read_sharded(folder)


def test_a_directory_without_weights(tmp_path):
  (tmp_path / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  with pytest.raises(CheckpointError, match=r"no weights.*model\.safetensors.*pytorch_model\.bin"):
    read_sharded(tmp_path)


def test_one_file_counts_before_shards_and_of_shards_all(tmp_path):
  write_sharded(tmp_path, in_memory({name: np.zeros(2, np.float32) for name in "abc"}), max_shard_bytes=16)
  index = tmp_path / "model.safetensors.index.json"
  places = json.loads(index.read_text())["weight_map"]
  index.write_text(json.dumps({"weight_map": {name: places[name] for name in "bc"}}))
  assert read_sharded(tmp_path).keys() == set("abc")
  write_safetensors(tmp_path / "model.safetensors", in_memory({"d": np.ones(2, np.float32)}))
  assert list(read_sharded(tmp_path)) == ["d"]

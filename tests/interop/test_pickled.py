"""PyTorch's files of tensors read without torch: against torch.load, and against hostile files."""

import json
import pickle
import random
import shutil
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).parents[2] / "tools"))

from fuzz_readers import tensors_program, write_pickles, write_text_vectors  # noqa: E402

from jaxllm.base.errors import CheckpointError  # noqa: E402
from jaxllm.interop import pickled  # noqa: E402
from jaxllm.interop.open import open_model  # noqa: E402
from jaxllm.interop.peft import read_weights  # noqa: E402
from jaxllm.interop.pickled import read_pickled  # noqa: E402
from jaxllm.interop.safetensors import read_sharded  # noqa: E402
from jaxllm.interop.sentence_transformers import read_text_vectors  # noqa: E402

KINDS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
LATER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
FORMS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def states():
  """Every type, views of every kind, a module's own dictionary with its attributes, and what are no tensors."""
  torch.manual_seed(0)
  x, deep = torch.randn(4, 6), torch.randn(2, 3, 4)
  tensors = {kind: (10 * x).abs().to(getattr(torch, kind)) for kind in KINDS}
  tensors |= {"turned": x.t(), "cut": x[1:, ::2], "row": x[2], "tied": x, "permuted": deep.permute(2, 0, 1)}
  tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "one": x[:1].expand(1, 6), "é": x[:0]}
  tensors |= {"parameter": torch.nn.Parameter(x), "part": deep[:, 1]}
  module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
  module.update(tensors)
  module.update({"step": 7, "nothing": None, "rate": 0.5, "name": "x", "list": [1, (2, x)], "shape": x.shape})
  return module


def check(got, want):
  tensors = {name: tensor.detach() for name, tensor in want.items() if isinstance(tensor, torch.Tensor)}
  assert list(got) == list(tensors)
  for name, tensor in tensors.items():
    x, numbers = got[name].read(), tensor.reshape(tensor.shape or (1,)).contiguous().view(torch.uint8).numpy().tobytes()
    assert (x.shape, str(x.dtype)) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")), name
    assert x.tobytes() == numbers and x.flags.c_contiguous, name
    assert (got[name].shape, got[name].dtype) == (x.shape, x.dtype)
    for index in np.ndindex(x.shape):
      for end in range(1, len(index) + 1):
        assert got[name].part(index[:end]).tobytes() == x[index[:end]].tobytes()
    assert all((part == x[i]).all() for i, part in enumerate(got[name].parts()) if got[name].stacked)


@FORMS
def test_every_type_and_view_as_torch_loads_it(tmp_path, zipped):
  torch.save(states(), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
  check(read_pickled(tmp_path / "x.bin"), torch.load(tmp_path / "x.bin"))


def test_types_without_storages_and_files_without_checksums(tmp_path, monkeypatch):
  monkeypatch.setattr(torch.serialization, "get_crc32_options", lambda: False)
  x = torch.arange(12).reshape(3, 4)
  later = {kind: x.to(getattr(torch, kind)) for kind in LATER}
  torch.save(later | {"cut": later["uint32"][1:, 1:], "turned": later["float8_e5m2"].t()}, tmp_path / "x.bin")
  with zipfile.ZipFile(tmp_path / "x.bin") as archive:
    assert {info.CRC for info in archive.infolist()} == {0}
  check(read_pickled(tmp_path / "x.bin"), torch.load(tmp_path / "x.bin"))


def rewritten(source, path, change=lambda name, data: data, **options):
  """A zip file with some members' content changed; those for which it is None are left out."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
    for name in old.namelist():
      if (data := change(name.partition("/")[2], old.read(name))) is not None:
        new.writestr(name, data, **options)
  return path


def test_a_big_endian_machine_and_one_of_before_that_was_said(tmp_path):
  torch.save(states(), tmp_path / "x.bin")
  for order in (b"big", None):
    other = lambda name, data, order=order: order if name == "byteorder" else data  # noqa: E731
    rewritten(tmp_path / "x.bin", tmp_path / "y.bin", other)
    check(read_pickled(tmp_path / "y.bin"), torch.load(tmp_path / "y.bin"))


def archive(path, program, **members):
  """A zip file with this program; `members` of data/, by their keys without the first letter."""
  with zipfile.ZipFile(path, "w") as file:
    for name, data in {"data.pkl": program, "version": b"3\n", "data/0": bytes(24)}.items():
      file.writestr(f"x/{name}", data)
    for key, data in members.items():
      file.writestr(f"x/data/{key[1:]}", data)
  return path


def test_a_dictionary_of_python_2(tmp_path):
  text = lambda x: b"U" + bytes([len(x)]) + x  # noqa: E731
  program = tensors_program({"w": np.ones((2, 3), np.float32)})
  tensor = program[program.index(b"ctorch._utils") : -2]
  pairs = (
    b"\x80\2ccollections\nOrderedDict\n(](](" + text(b"w") + tensor + b"e](" + text("é".encode()) + tensor + b"eetR"
  )
  path = archive(tmp_path / "x.bin", pairs + b"}" + text(b"_metadata") + b"}sb.")
  check(read_pickled(path), torch.load(path))
  assert list(read_pickled(path)) == ["w", "é"]


def test_only_the_program_is_read_and_then_what_is_asked_for(tmp_path):
  for zipped in (True, False):
    tensors = {"a": torch.ones(8, 1 << 20), "b": torch.ones(2)}
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    tracemalloc.start()
    tensors = read_pickled(tmp_path / "x.bin")
    assert tensors["a"].part((3, 5)) == 1 and tensors["b"].read().tolist() == [1, 1]
    assert tracemalloc.get_traced_memory()[1] < (2e6 if zipped else pickled.MAX_BYTES + 2e6)  # of 32e6
    tracemalloc.stop()


def test_a_file_cut_after_it_was_opened(tmp_path):
  torch.save({"a": torch.ones(5000)}, tmp_path / "x.bin")
  tensor = read_pickled(tmp_path / "x.bin")["a"]
  with (tmp_path / "x.bin").open("r+b") as file:
    file.truncate(9000)
  with pytest.raises(CheckpointError, match="ends within the tensor a"):
    tensor.read()


# Directories


def opt():
  config = transformers.OPTConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2, max_position_embeddings=32,
    word_embed_proj_dim=16,
  )  # fmt: skip
  return transformers.OPTForCausalLM(config)


def deberta():
  config = transformers.DebertaV2Config(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, type_vocab_size=0,
    max_position_embeddings=32, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm",
    share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, max_relative_positions=-1,
  )  # fmt: skip
  return transformers.DebertaV2ForSequenceClassification(config).half()


@pytest.mark.parametrize("made, zipped", [(opt, True), (opt, False), (deberta, False)])
def test_a_model_is_what_it_is_in_safetensors(made, zipped, tmp_path):
  torch.manual_seed(0)
  model = made()
  model.save_pretrained(tmp_path)
  want = open_model(tmp_path)
  tensors = {path: tensor.read() for path, tensor in want.tensors.items()}
  (tmp_path / "model.safetensors").unlink()
  (tmp_path / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
  torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
  got = open_model(tmp_path)
  assert got.config == want.config and got.tensors.keys() == tensors.keys()
  for path, x in tensors.items():
    assert got.tensors[path].dtype == x.dtype
    np.testing.assert_array_equal(got.tensors[path].read(), x)


def test_shards_and_what_comes_first(tmp_path):
  shards = {"pytorch_model-00001-of-00002.bin": "ab", "pytorch_model-00002-of-00002.bin": "c"}
  for shard, names in shards.items():
    torch.save({name: torch.full((2,), float(ord(name))) for name in names}, tmp_path / shard)
  places = {name: shard for shard, names in shards.items() for name in names}
  index = tmp_path / "pytorch_model.bin.index.json"
  index.write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": places}))
  assert {name: tensor.read()[0] for name, tensor in read_sharded(tmp_path).items()} == {x: ord(x) for x in "abc"}
  index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
  with pytest.raises(CheckpointError, match="not a .bin file beside it"):
    read_sharded(tmp_path)
  torch.save({"d": torch.ones(1)}, tmp_path / "pytorch_model.bin")
  assert list(read_sharded(tmp_path)) == ["d"]
  from safetensors.torch import save_file

  save_file({"e": torch.ones(1)}, tmp_path / "model.safetensors")
  assert list(read_sharded(tmp_path)) == ["e"]


def test_an_adapter_and_a_dense_layer(tmp_path):
  torch.save({"base_model.model.q.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.bin")
  assert list(read_weights(tmp_path)) == ["q.lora_A.weight"]
  write_text_vectors(tmp_path)
  want = read_text_vectors(tmp_path)
  (tmp_path / "2_Dense" / "model.safetensors").unlink()
  torch.save(
    torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 4)}).state_dict(), tmp_path / "2_Dense/pytorch_model.bin"
  )
  got = read_text_vectors(tmp_path)
  assert got.steps[0].weight.shape == want.steps[0].weight.shape and "2_Dense/pytorch_model.bin" in got.files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
  "value, message",
  [
    ({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, "stand under 'state_dict'"),
    ({"optimizer": {0: torch.ones(2)}, "model": {"w": torch.ones(2)}}, "stand under 'optimizer'"),
    ([torch.ones(2)], "not put together"),
    (torch.ones(2), "not put together"),
    ({0: torch.ones(2)}, "names a tensor 0"),
    ({"a\nb": torch.ones(2)}, r"names a tensor 'a\\nb'"),
    ({(1, 2): torch.ones(2)}, "key that is a tuple"),
    (torch.nn.Linear(2, 2), r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    ({"w": torch.ones(2), "n": np.float64(1)}, "asks for 'numpy"),
    ({"w": torch.ones(2).to_sparse()}, "asks for 'torch"),
    ({"w": torch.ones(2, dtype=torch.complex64)}, r"asks for 'torch\.ComplexFloatStorage'"),
    ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, "conjugate|ComplexFloat|negative"),
    ({"w": torch.ones(2).expand(1000, 2)}, "does not lie in its storage of 2 numbers"),
  ],
)
def test_what_is_no_dictionary_of_tensors_is_refused(value, message, zipped, tmp_path):
  torch.save(value, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
  refuses(tmp_path / "x.bin", message)


# Strangers


def refuses(path, message):
  with pytest.raises(CheckpointError, match=message) as raised:
    read_pickled(path)
  assert str(raised.value).isprintable() and str(path) in str(raised.value)


def reads_or_refuses(path):
  """Whether a file is read; neither takes memory."""
  tracemalloc.start()
  try:
    for tensor in read_pickled(path).values():
      assert tensor.read().shape == tensor.shape
    return True
  except CheckpointError as error:
    assert str(error).isprintable()
    return False
  finally:
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


class Calls:
  def __init__(self, function, *arguments):
    self.called = function, arguments

  def __reduce__(self):
    return self.called


CODE = "open('ran', 'w')"
BOMB = b"K\0" + 60 * b"q\0h\0\x86"  # a tuple whose hash, text or comparison takes 2**60 steps
TENSOR = tensors_program({"w": np.ones((2, 3), np.float32)})


def of_tensor(
  offset=b"K\0", shape=b"(J\2\0\0\0J\3\0\0\0t", strides=b"(J\3\0\0\0J\1\0\0\0t", size=b"J\6\0\0\0", key=b"0"
):
  begin, end = TENSOR.split(b"tQ")
  begin = begin.replace(b"J\6\0\0\0", size).replace(b"X\1\0\0\0000", b"X" + struct.pack("<I", len(key)) + key)
  return begin + b"tQ" + offset + shape + strides + end[end.index(b"\x89") :]


def long(number):
  return pickle.dumps(number, 2)[2:-1]


PROGRAMS = {
  "system": (pickle.dumps({"w": Calls(__import__("os").system, "touch ran")}, 2), "asks for '(posix|os).system'"),
  "exec": (pickle.dumps(Calls(exec, CODE), 2), "asks for '__builtin__.exec'"),
  "getattr": (b"cbuiltins\ngetattr\n.", "asks for 'builtins.getattr'"),
  "a name with a space": (b"ctorch._utils _rebuild\ntensor\n.", "asks for"),
  "a module of ours": (b"cjaxllm.interop.pickled\nPath\n.", "asks for 'jaxllm"),
  "torch.load": (b"ctorch\nload\n.", "asks for 'torch.load'"),
  "control characters": (b"cos\x1b[31m\nsystem\n.", "asks for"),
  "INST": (b"(S'x'\nios\nsystem\n.", "instruction"),
  "OBJ": (b"(}X\1\0\0\0xo.", "instruction OBJ"),
  "NEWOBJ": (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
  "STACK_GLOBAL": (b"\x8c\2os\x8c\6system\x93.", "instruction SHORT_BINUNICODE"),
  "EXT1": (b"\x82\1.", "instruction EXT1"),
  "DUP": (b"]2222.", "instruction DUP"),
  "PERSID": (b"Pstorage\n.", "instruction PERSID"),
  "attributes of a function": (b"ctorch._utils\n_rebuild_tensor\n}X\1\0\0\0aNsb.", "not put together"),
  "defaults of a function": (b"ctorch._utils\n_rebuild_tensor\nN}X\x0c\0\0\0__defaults__)s\x86b.", "not put together"),
  "a number is called": (b"K\1)R.", "not put together"),
  "no arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "not put together"),
  "a parameter of nothing": (b"ctorch._utils\n_rebuild_parameter\n(NNNtR.", "not put together"),
  "a tensor of nothing": (b"ctorch._utils\n_rebuild_tensor\n(NNNNtR.", "has no storage"),
  "an empty stack": (b"R.", "not put together"),
  "no mark": (b"}u.", "not put together"),
  "an odd item": (b"}(K\1u.", "."),
  "no memo": (b"h\7.", "not put together"),
  "no end": (b"}}", "."),
  "nothing": (b"", "."),
  "a long text": (b"X\xff\xff\xff\xffabc.", "."),
  "a longer one": (b"\x8d" + b"\xff" * 7 + b"\x7fabc.", "."),
  "a long number": (b"\x8b\xff\xff\xff\x7fabc.", "."),
  "digits": (b"L" + b"9" * 100_000 + b"L\n.", "."),
  "half a character": (b"}X\3\0\0\0\xed\xa0\x80" + TENSOR[TENSOR.index(b"ctorch") : -2] + b"s.", "names a tensor"),
  "a key that is a bomb": (b"}" + BOMB + b"Ns.", "key that is a tuple"),
  "a storage's key that is a bomb": (b"(X\7\0\0\0storagectorch\nFloatStorage\n" + BOMB + b"NK\1tQ.", "names a storage"),
  "a storage that is a bomb": (BOMB + b"Q.", "names a storage"),
  "a shape that is a bomb": (of_tensor(shape=BOMB), "no possible shape"),
  "a key twice": (TENSOR.replace(b"RtRu.", b"RtRX\1\0\0\0wNu."), "'w' stands in it twice"),
  "two storages": (
    TENSOR[:-2] + TENSOR[4:-2].replace(b"\0w", b"\0v").replace(b"Float", b"Half") + b"u.",
    "two storages",
  ),
  "too long": (of_tensor(shape=b"(" + long(2**62) + long(2**62) + b"t"), "no possible shape"),
  "nothing of much": (of_tensor(shape=b"(K\0" + long(2**62) + b"t"), "no possible shape"),
  "one too many": (of_tensor(shape=b"(K\2K\4t"), "does not lie in its storage of 6"),
  "an end outside": (of_tensor(offset=b"K\1"), "does not lie"),
  "a far beginning": (of_tensor(offset=long(2**63 - 1)), "does not lie"),
  "a beginning before": (of_tensor(offset=long(-1)), "no possible shape"),
  "backwards": (of_tensor(offset=b"K\5", strides=b"(" + long(-3) + long(-1) + b"t"), "no possible shape"),
  "a wide stride": (of_tensor(strides=b"(" + long(2**61) + b"K\1t"), "does not lie"),
  "a lacking stride": (of_tensor(strides=b"(K\1t"), "no possible shape"),
  "a shape of truths": (of_tensor(shape=b"(\x88\x88t"), "no possible shape"),
  "a shape of text": (of_tensor(shape=b"X\2\0\0\0ab"), "not put together"),
  "many axes": (of_tensor(shape=b"(" + b"K\1" * 70 + b"t", strides=b"(" + b"K\1" * 70 + b"t"), "no possible shape"),
  "repeated": (of_tensor(shape=b"(J\xff\xff\xff\x7fK\1t", strides=b"(K\0K\0t"), "does not lie"),
  "a storage longer than its member": (of_tensor(size=long(2**60)), "lacks the storage '0', or has not all"),
  "a storage of less than nothing": (of_tensor(size=long(-1)), "does not lie"),
  "a storage that is not there": (of_tensor(key=b"1"), "lacks the storage '1'"),
  "a storage elsewhere": (of_tensor(key=b"../../../etc/passwd"), "lacks the storage"),
  "a storage that is the program": (of_tensor(key=b"../data.pkl"), "lacks the storage"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_hostile_programs_are_refused(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  program, message = PROGRAMS[name]
  keys = pickle.dumps(["0"], 2) + (6).to_bytes(8, "little") + bytes(24)
  head = pickle.dumps(pickled.MAGIC, 2) + pickle.dumps(pickled.VERSION, 2) + pickle.dumps({}, 2)
  archive(tmp_path / "x.bin", program)
  (tmp_path / "old.bin").write_bytes(head + program + keys)
  (tmp_path / "bare.bin").write_bytes(program)
  refuses(tmp_path / "x.bin", message)
  refuses(tmp_path / "old.bin", ".")
  refuses(tmp_path / "bare.bin", ".")
  assert not reads_or_refuses(tmp_path / "x.bin")
  assert not (tmp_path / "ran").exists()
  check(read_pickled(archive(tmp_path / "good.bin", TENSOR)), {"w": torch.zeros(2, 3)})  # nothing has been changed


ORDERED = b"ccollections\nOrderedDict\nq\0"
BOMBS = {
  "a tuple": BOMB,
  "a place in the memo": b"]r\xff\xff\xff\xff",
  "a list in itself": b"]q\1h\1a",
  "a deep tuple": 5000 * b"(" + 5000 * b"t",
  "many tables of a list": b"(" + ORDERED + b"](](X\1\0\0\0aNeeq\1\x85R" + b"h\0h\1\x85R" * 1000 + b"t",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_that_are_no_tensors_do_nothing(name, tmp_path):
  assert reads_or_refuses(archive(tmp_path / "x.bin", b"}X\1\0\0\0x" + BOMBS[name] + b"s."))


def test_programs_are_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(pickled, "MAX_STEPS", 100)
  refuses(archive(tmp_path / "x.bin", b"}" + b"N" * 100 + b"."), "more than 100 steps")
  monkeypatch.setattr(pickled, "MAX_BYTES", 2000)
  refuses(archive(tmp_path / "x.bin", TENSOR + bytes(2000)), "takes .* bytes, and at most 2000")
  refuses(
    archive(tmp_path / "x.bin", TENSOR, **{f"k{i}": b"" for i in range(1, 60)}), "takes .* bytes, and at most 2000"
  )


def test_hostile_archives_are_refused(tmp_path):
  torch.save({"w": torch.ones(300)}, tmp_path / "good.bin")
  data = (tmp_path / "good.bin").read_bytes()
  path = tmp_path / "x.bin"
  refuses(rewritten(tmp_path / "good.bin", path, compress_type=zipfile.ZIP_DEFLATED), "compressed or encrypted")
  lacks = lambda lacking: rewritten(tmp_path / "good.bin", path, lambda name, x: None if name == lacking else x)  # noqa: E731
  refuses(lacks("data/0"), "lacks the storage '0'")
  refuses(lacks("data.pkl"), "not put together")
  shorter = lambda name, x: x[:-1] if name == "data/0" else x  # noqa: E731
  refuses(rewritten(tmp_path / "good.bin", path, shorter), "lacks the storage '0', or has not all of it")
  middle = lambda name, x: b"middle" if name == "byteorder" else x  # noqa: E731
  refuses(rewritten(tmp_path / "good.bin", path, middle), "order b'middle'")
  with pytest.warns(UserWarning, match="Duplicate"):
    refuses(archive(path, TENSOR, k0=bytes(24)), "twice")
  at = data.index(b"PK\1\2")  # the directory: flags at 8, the sizes at 20 and 24, the place at 42
  for place, value, message in ((8, 1, "encrypted"), (20, 5, "compressed"), (42, 7, "not where it says")):
    path.write_bytes(data[: at + place] + bytes([value]) + data[at + place + 1 :])
    refuses(path, message)
  path.write_bytes(data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"))
  refuses(path, "the checksum of data.pkl in it differs")
  with zipfile.ZipFile(path, "w"):
    pass
  refuses(path, ".")
  shutil.make_archive(str(tmp_path / "t"), "tar", tmp_path, "good.bin")
  refuses(tmp_path / "t.tar", "tar archive")
  path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
  refuses(path, ".")


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_every_cut_and_drawn_changes(name, tmp_path):
  write_pickles(tmp_path)
  data, path = (tmp_path / name).read_bytes(), tmp_path / "x.bin"
  assert reads_or_refuses(tmp_path / name)
  check(read_pickled(tmp_path / name), torch.load(tmp_path / name))
  for length in range(0, len(data), 23):
    path.write_bytes(data[:length])
    assert not reads_or_refuses(path), length
  rng = random.Random(0)
  read = 0
  for _ in range(80):
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
      changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    read += reads_or_refuses(path)
  assert 0 < read < 80

"""The readers that `fuzzing` tries, each with a sample that it reads whole."""

import dataclasses
import functools
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fuzz_configs import CONFIGS, LLAMA
from fuzzing import Reader

TEXT = "The quick brown fox jumps over the lazy dog, and 3.14 is not 22/7.\n"
TEMPLATE = (
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]


@functools.cache
def tokenizer() -> Any:
  """A byte-level BPE tokenizer that chats."""
  import tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet
  from jaxllm.interop.gguf.tokenizer import PRE_TOKENIZERS

  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet() | {"th": 256, "he": 257}, [("t", "h"), ("h", "e")]))
  split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZERS["qwen2"][0]), "isolated")
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  rust.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
  rust.decoder = tokenizers.decoders.ByteLevel()
  rust.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
  more = {"added_tokens_decoder": {"261": {"content": "<x>", "special": False}}, "additional_special_tokens": ["</s>"]}
  settings = {"bos_token": "</s>", "eos_token": {"content": "</s>", "lstrip": False}, "padding_side": "left"}
  return HuggingFaceTokenizer(rust.to_str(), settings | more | {"chat_template": TEMPLATE})


@functools.cache
def sentencepiece() -> Any:
  from jaxllm.data.config import TokenizerConfig
  from jaxllm.data.train_tokenizer import train_sentencepiece

  documents = [TEXT.replace("dog", f"dog {i}").encode() for i in range(40)]
  return train_sentencepiece(documents, TokenizerConfig(kind="sentencepiece_bpe", vocab_size=310))


@functools.cache
def model() -> Any:
  import numpy as np

  from jaxllm.interop.huggingface import config_from_huggingface
  from jaxllm.interop.stored import StoredModel, param_shapes
  from jaxllm.interop.tensors import in_memory

  config = config_from_huggingface(LLAMA | {"model_type": "llama"})
  rng = np.random.default_rng(0)
  tensors = {path: rng.normal(size=shape).astype(np.float32) for path, shape in param_shapes(config).items()}
  generation = {"eos_token_id": [258, 260], "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 8, "do_sample": True}
  return StoredModel(config, in_memory(tensors), tokenizer(), generation)


def write_model_as(format: str, name: str = "") -> Callable[[Path], None]:
  def write(directory: Path) -> None:
    from jaxllm.interop.write import write_model

    write_model(model(), directory / (name or "model"), format=format, max_shard_bytes=4000)  # type: ignore[arg-type]

  return write


def write_adapter(directory: Path) -> None:
  import numpy as np

  from jaxllm.interop.safetensors import write_safetensors
  from jaxllm.interop.tensors import in_memory

  write_model_as("hf", "base")(directory)
  settings = {"peft_type": "LORA", "base_model_name_or_path": "../base", "r": 4, "lora_alpha": 8, "use_rslora": False}
  settings |= {"target_modules": r".*\.(q_proj|down_proj)", "rank_pattern": {r"layers\.1\..*q_proj": 2}, "bias": "none"}
  settings |= {"alpha_pattern": {"down_proj": 16}, "modules_to_save": None, "layers_pattern": None, "lora_dropout": 0.1}
  tensors = {}
  for layer, rank in ((0, 4), (1, 2)):
    for module, inputs, outputs, r in (("self_attn.q_proj", 8, 8, rank), ("mlp.down_proj", 12, 8, 4)):
      start = f"base_model.model.model.layers.{layer}.{module}"
      tensors[f"{start}.lora_A.weight"] = np.ones((r, inputs), np.float32)
      tensors[f"{start}.lora_B.weight"] = np.ones((outputs, r), np.float32)
  (directory / "adapter").mkdir()
  (directory / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
  write_safetensors(directory / "adapter" / "adapter_model.safetensors", in_memory(tensors))


def write_bitsandbytes(directory: Path) -> None:
  """A Hugging Face model whose matrices in the layers are in 4 bits."""
  import numpy as np

  from jaxllm.interop.safetensors import read_sharded, write_safetensors
  from jaxllm.interop.tensors import in_memory
  from jaxllm.kernels.quantized.weights import NF4

  write_model_as("hf")(directory)
  tensors: dict[str, Any] = {}
  for name, tensor in read_sharded(directory / "model").items():
    if not name.endswith("_proj.weight"):
      tensors[name] = tensor.read()
      continue
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(tensor.shape)}
    count = tensor.shape[0] * tensor.shape[1]
    tensors[name] = np.full((count // 2, 1), 0x7F, np.uint8)
    tensors[f"{name}.absmax"] = np.ones(-(-count // 64), np.float32)
    tensors[f"{name}.quant_map"] = np.asarray(NF4, np.float32)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
  for file in (directory / "model").glob("model*"):
    file.unlink()
  write_safetensors(directory / "model" / "model.safetensors", in_memory(tensors))
  config = json.loads((directory / "model" / "config.json").read_text())
  method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
  (directory / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": method}))


def write_wordpiece(directory: Path) -> None:
  (directory / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "##s", *"abcdefg"]))
  (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "strip_accents": None}))


def write_merges(directory: Path) -> None:
  from jaxllm.data.tokenizers import byte_alphabet

  (directory / "vocab.json").write_text(json.dumps(byte_alphabet() | {"th": 256, "<|endoftext|>": 257}))
  (directory / "merges.txt").write_text("#version: 0.2\nt h\n")
  (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
  (directory / "added_tokens.json").write_text(json.dumps({"<x>": 258}))


def read_model(path: Path) -> Any:
  """Opens a model and reads all of it; its generation settings, tokenizer and template are used."""
  from jaxllm.inference.generation_config import default_sampling
  from jaxllm.interop.open import open_model

  stored = open_model(path)
  for tensor in stored.tensors.values():
    tensor.read()
  default_sampling(stored.generation, stored.config.architecture)
  if stored.tokenizer is not None:
    use_tokenizer(stored.tokenizer)
  return stored.config


def use_tokenizer(tokenizer: Any) -> None:
  ids = tokenizer.encode(TEXT)
  tokenizer.decode(ids)
  tokenizer.encode_prompt("<|im_start|> \u2581 \U0001f600 </s>")
  tokenizer.encode_chats([TEXT])
  tokenizer.pieces()
  _ = tokenizer.end_of_turn_id, tokenizer.padding_side
  if tokenizer.chat_templates:
    tokenizer.render_chat(CHAT, add_generation_prompt=True)


def write_tokenizer(made: Callable[[], Any]) -> Callable[[Path], None]:
  def write(directory: Path) -> None:
    made().save(directory)
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))

  return write


def read_tokenizer(directory: Path) -> None:
  from jaxllm.data.tokenizers import load_tokenizer

  use_tokenizer(load_tokenizer(directory))


def write_configs(directory: Path) -> None:
  for name, config in CONFIGS.items():
    (directory / f"{name}.json").write_text(json.dumps({"model_type": name} | config))


@functools.cache
def tensors_of(family: str) -> Any:
  """The tensors of a checkpoint of a family."""
  import numpy as np

  from jaxllm.interop.huggingface import config_from_huggingface, to_huggingface
  from jaxllm.interop.stored import param_shapes
  from jaxllm.interop.tensors import in_memory

  model = config_from_huggingface({"model_type": family} | CONFIGS[family])
  params = in_memory({path: np.zeros(shape, np.float32) for path, shape in param_shapes(model).items()})
  return to_huggingface(model, family.replace("gemma3_text", "gemma3").replace("gemma3", "gemma3_text"), params)[1]


def read_configs(directory: Path) -> None:
  """The changed ones; what is refused is said of the first."""
  from jaxllm.base.errors import UserError
  from jaxllm.interop.directory_files import read_json
  from jaxllm.interop.huggingface import config_from_huggingface, from_huggingface
  from jaxllm.interop.stored import param_shapes

  refused: list[UserError] = []
  for name, config in CONFIGS.items():
    file = directory / f"{name}.json"
    if file.read_bytes() == json.dumps({"model_type": name} | config).encode() and name in _read:
      continue
    _read.add(name)
    try:
      found = read_json(file)
      param_shapes(config_from_huggingface(found))
      for tensor in from_huggingface(found, tensors_of(name))[1].values():
        tensor.read()
    except UserError as error:
      refused.append(error)
  if refused:
    raise refused[0]


_read: set[str] = set()


def write_generation(directory: Path) -> None:
  settings = {
    "eos_token_id": [1, 2],
    "bos_token_id": 0,
    "pad_token_id": 0,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
  }
  settings |= {"do_sample": True, "max_new_tokens": 8, "min_length": 0, "bad_words_ids": [[1], [2, 3]], "num_beams": 1}
  settings |= {"sequence_bias": [[[1, 2], 0.5]], "suppress_tokens": [3], "forced_bos_token_id": None, "max_length": 20}
  settings |= {"repetition_penalty": 1.1, "no_repeat_ngram_size": 0, "stop_strings": ["x"], "watermarking_config": None}
  (directory / "generation_config.json").write_text(json.dumps(settings))


def read_generation(directory: Path) -> None:
  from jaxllm.inference.generation_config import default_sampling, default_settings
  from jaxllm.interop.directory_files import read_generation_config

  for architecture in ("decoder", "encoder_decoder"):
    generation = read_generation_config(directory)
    default_settings(generation, architecture)
    default_sampling(generation, architecture).named_tokens()


def write_tensors(directory: Path) -> None:
  import numpy as np

  from jaxllm.interop.safetensors import write_sharded
  from jaxllm.interop.tensors import in_memory

  write_sharded(directory, in_memory({f"t{i}": np.ones((3, i + 1), np.float32) for i in range(4)}), 60)


def read_tensors(directory: Path) -> None:
  from jaxllm.interop.safetensors import read_sharded

  for tensor in read_sharded(directory).values():
    tensor.read()


def write_pickles(directory: Path) -> None:
  """As torch.save writes them, of now and from before 1.6."""
  import numpy as np

  from jaxllm.interop.pickled import MAGIC, VERSION

  arrays = {"weight": np.ones((3, 4), np.float32), "turned": np.ones((4, 2, 3), np.float32).T, "one": np.float32(2)}
  with zipfile.ZipFile(directory / "zip.bin", "w") as archive:
    archive.writestr("zip/data.pkl", tensors_program(arrays))
    archive.writestr("zip/byteorder", "little")
    archive.writestr("zip/version", "3\n")
    for key, array in enumerate(arrays.values()):
      archive.writestr(f"zip/data/{key}", array.tobytes())
  head = [pickle.dumps(part, 2) for part in (MAGIC, VERSION, {"little_endian": True})]
  head += [tensors_program(arrays, b"N"), pickle.dumps([str(key) for key in range(len(arrays))], 2)]
  storages = [array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values()]
  (directory / "legacy.bin").write_bytes(b"".join(head + storages))


def tensors_program(arrays: Mapping[str, Any], end: bytes = b"") -> bytes:
  """The pickle of a dictionary of torch's tensors in float32, of which each has a storage of its own."""

  def text(x: str) -> bytes:
    return b"X" + len(x).to_bytes(4, "little") + x.encode()

  def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + value.to_bytes(4, "little") for value in values) + b"t"

  parts = [b"\x80\2}("]
  for key, (name, array) in enumerate(arrays.items()):
    storage = text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu") + numbers(array.size)[1:-1]
    parts += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", storage, end, b"tQK\0", numbers(*array.shape)]
    parts += [numbers(*(stride // 4 for stride in array.strides)), b"\x89ccollections\nOrderedDict\n)RtR"]
  return b"".join(parts) + b"u."


def read_pickles(directory: Path) -> None:
  """Both; what is refused is said of the first."""
  from jaxllm.base.errors import UserError
  from jaxllm.interop.pickled import read_pickled

  refused: list[UserError] = []
  for file in sorted(directory.glob("*.bin")):
    try:
      for tensor in read_pickled(file).values():
        tensor.read()
    except UserError as error:
      refused.append(error)
  if refused:
    raise refused[0]


def write_run_config(directory: Path) -> None:
  from jaxllm.base import settings
  from jaxllm.training.config import RunConfig

  (directory / "config.json").write_text(json.dumps(settings.to_mapping(RunConfig())))


def read_run_config(directory: Path) -> None:
  from jaxllm.config import resolve
  from jaxllm.interop.directory_files import read_json
  from jaxllm.interop.model_directory import read_model_config

  resolve(read_json(directory / "config.json"))
  read_model_config(directory)


def write_template(directory: Path) -> None:
  (directory / "chat_template.jinja").write_text(
    TEMPLATE + "{% macro f(x) %}{{ x * 2 }}{% endmacro %}{% set ns = namespace(n=0) %}{% for i in range(3) %}"
    "{% set ns.n = ns.n + i %}{% if loop.last %}{{ f('ab') ~ ns.n }}{% endif %}{% endfor %}"
    "{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{{ 'x'.replace('x', 'y') | indent(2) }}"
  )


def read_template(directory: Path) -> None:
  from jaxllm.base.errors import DataError
  from jaxllm.data.chat import render_chat

  try:
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise DataError("not UTF-8") from error
  render_chat(template, CHAT, tools=[{"name": "f"}], bos_token="<s>")


def write_rows(directory: Path) -> None:
  import pyarrow
  import pyarrow.parquet

  rows = [{"text": f"{TEXT} {i}", "messages": CHAT, "tools": [{"name": "f"}]} for i in range(6)]
  (directory / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
  (directory / "b.json").write_text(json.dumps(rows[:3]))
  pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT, TEXT[:5]]}), directory / "c.parquet")
  (directory / "d.txt").write_text(TEXT)


def read_rows(directory: Path) -> None:
  from jaxllm.base.errors import UserError
  from jaxllm.data.config import SourceConfig
  from jaxllm.data.conversations import conversation_of, from_json, to_json
  from jaxllm.data.sources import open_source

  refused: list[UserError] = []
  kinds = {"a.jsonl": "jsonl", "b.json": "json", "c.parquet": "parquet", "d.txt": "text"}
  chats = {"field": "messages", "format": "auto"}
  for name, kind in kinds.items():
    for more in ({"field": "text"}, chats) if kind in ("jsonl", "json") else ({"field": "text"},):
      content = (lambda row, config: to_json(conversation_of(row))) if more is chats else None
      config = dataclasses.replace(SourceConfig(kind=kind, path=str(directory / name)), **more)  # type: ignore[arg-type]
      try:
        for document in open_source(config, content).documents():
          if content:
            from_json(document.data)
      except UserError as error:
        refused.append(error)
  if refused:
    raise refused[0]


def write_text_vectors(directory: Path) -> None:
  import numpy as np

  from jaxllm.interop.safetensors import write_safetensors
  from jaxllm.interop.tensors import in_memory

  names = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
  modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in names]
  files = {
    "modules.json": modules,
    "sentence_bert_config.json": {"max_seq_length": 16, "do_lower_case": True},
    "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    "1_Pooling/config.json": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True, "include_prompt": False},
    "2_Dense/config.json": {"in_features": 8, "out_features": 4, "bias": True},
  }
  for name, value in files.items():
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text(json.dumps(value))
  tensors = in_memory({"linear.weight": np.ones((4, 8), np.float32), "linear.bias": np.ones(4, np.float32)})
  write_safetensors(directory / "2_Dense" / "model.safetensors", tensors)


def read_vectors(directory: Path) -> None:
  import numpy as np

  from jaxllm.interop.sentence_transformers import read_text_vectors

  if vectors := read_text_vectors(directory):
    vectors.finish(np.ones((1, 8), np.float32))
    vectors.prompt(None)


READERS: dict[str, Reader] = {
  "families": Reader(write_configs, read_configs),
  "huggingface": Reader(write_model_as("hf"), lambda path: read_model(path / "model")),
  "adapter": Reader(
    write_adapter, lambda path: read_model(path / "adapter"), lambda path: path.parent.name == "adapter"
  ),
  "model_directory": Reader(write_model_as("jaxllm"), lambda path: read_model(path / "model")),
  "bitsandbytes": Reader(write_bitsandbytes, lambda path: read_model(path / "model")),
  "gguf": Reader(write_model_as("gguf", "model.gguf"), lambda path: read_model(path / "model.gguf")),
  "safetensors": Reader(write_tensors, read_tensors),
  "pickles": Reader(write_pickles, read_pickles),
  "tokenizer_json": Reader(write_tokenizer(tokenizer), read_tokenizer),
  "sentencepiece": Reader(write_tokenizer(sentencepiece), read_tokenizer),
  "wordpiece": Reader(write_wordpiece, read_tokenizer),
  "merges": Reader(write_merges, read_tokenizer),
  "generation_config": Reader(write_generation, read_generation),
  "run_config": Reader(write_run_config, read_run_config),
  "chat_template": Reader(write_template, read_template),
  "rows": Reader(write_rows, read_rows),
  "text_vectors": Reader(write_text_vectors, read_vectors),
}

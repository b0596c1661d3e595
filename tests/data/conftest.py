"""A small corpus of every kind of text, prepared once."""

import json

import numpy as np
import pytest
from oddities import ODDITIES

from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.prepare import prepare


def words(rng: np.random.Generator, count: int) -> bytes:
  vocabulary = [f"word{i}" for i in range(40)] + ["def", "return", "\n    ", "x = 1", "(", ")"]
  return " ".join(rng.choice(vocabulary, count)).encode()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """60 files of 1 to 400 words, and the oddities."""
  root = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for i in range(60):
    path = root / f"part{i % 3}" / f"{i:03d}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(words(rng, int(rng.integers(1, 400))))
  for i, data in enumerate(ODDITIES):
    (root / f"odd{i}.txt").write_bytes(data)
  return root


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
  """A tokenizer.json of the 256 byte-level characters and <|endoftext|>, without merges."""
  from jaxllm.data.tokenizers import byte_alphabet

  vocabulary = {char: byte for char, byte in sorted(byte_alphabet().items(), key=lambda item: item[1])}
  byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
  definition = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      {"id": 256, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
       "normalized": False, "special": True}
    ],
    "normalizer": None,
    "pre_tokenizer": byte_level,
    "post_processor": None,
    "decoder": byte_level,
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary,
              "merges": []},
  }  # fmt: skip
  path = tmp_path_factory.mktemp("bytes") / "tokenizer.json"
  path.write_text(json.dumps(definition))
  return path


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
  """chat_tokenizer(template): a byte-level tokenizer with every template's control tokens.

  With `begins` it puts BOS before a text.
  """
  import tokenizers
  from chat_templates import END_OF_TURN

  from jaxllm.data.tokenizers import HuggingFaceTokenizer, byte_alphabet

  rust = tokenizers.Tokenizer(tokenizers.models.BPE(byte_alphabet(), []))
  rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  rust.decoder = tokenizers.decoders.ByteLevel()
  special = {"<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", *END_OF_TURN.values()}
  rust.add_special_tokens(["<s>", "</s>", *sorted(special - {None, "</s>"})])

  plain = rust.to_str()
  rust.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])

  def make(template=None, begins=False):
    named = {} if template is None else {"chat_template": template}
    return HuggingFaceTokenizer(rust.to_str() if begins else plain, {"bos_token": "<s>", "eos_token": "</s>", **named})

  return make


@pytest.fixture(scope="session")
def config(corpus, tmp_path_factory):
  """Prepared: one source, trained tokenizer, a fifth held out."""
  config = DataConfig(
    dir=str(tmp_path_factory.mktemp("prepared")),
    sources=(SourceConfig(path=f"{corpus}/**/*.txt", name="words"),),
    tokenizer=TokenizerConfig(vocab_size=340),
    heldout_fraction=0.2,
  )
  prepare(config, log=lambda line: None)
  return config


@pytest.fixture(scope="session")
def mixture(corpus, byte_tokenizer, tmp_path_factory):
  """Prepared: two sources of different size, byte tokenizer."""
  config = DataConfig(
    dir=str(tmp_path_factory.mktemp("mixture")),
    sources=(
      SourceConfig(path=f"{corpus}/part0/*.txt", name="first", weight=3.0),
      SourceConfig(path=f"{corpus}/part1/*.txt,{corpus}/part2/*.txt", name="second", weight=1.0),
    ),
    tokenizer=TokenizerConfig(path=str(byte_tokenizer)),
    heldout_fraction=0.2,
  )
  prepare(config, log=lambda line: None)
  return config

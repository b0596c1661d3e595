"""What the conversions of this room start from."""

import sysconfig
from pathlib import Path

import pytest
from gguf_models import TEXT

from jaxllm.data.config import TokenizerConfig
from jaxllm.data.train_tokenizer import train_sentencepiece

DOCUMENTS = [TEXT.replace("dog", f"dog {i}").encode() for i in range(40)]


@pytest.fixture(scope="session")
def stdlib():
  """Source files, as bytes."""
  files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
  return [file.read_bytes() for file in files[:120]]


@pytest.fixture(scope="session")
def sentencepiece(stdlib):
  """kind -> a tokenizer as `jaxllm.prepare` trains it."""
  kinds = ("bpe", "unigram")
  configs = {kind: TokenizerConfig(kind=f"sentencepiece_{kind}", vocab_size=600) for kind in kinds}
  return {kind: train_sentencepiece(stdlib[:20], config) for kind, config in configs.items()}


@pytest.fixture(scope="session")
def sentencepiece_bpe():
  return train_sentencepiece(DOCUMENTS, TokenizerConfig(kind="sentencepiece_bpe", vocab_size=320))


@pytest.fixture(scope="session")
def sentencepiece_unigram():
  return train_sentencepiece(DOCUMENTS, TokenizerConfig(kind="sentencepiece_unigram", vocab_size=330))

"""T5's sentinels: more noise spans in a row than the vocabulary has are an error before any row is made."""

import dataclasses
import json

import numpy as np
import pytest

from jaxllm.base.errors import DataError
from jaxllm.data.config import CorruptionConfig, DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.corruption import span_counts, tokens_that_fill
from jaxllm.data.heldout import heldout_batches
from jaxllm.data.pipeline import train_batches
from jaxllm.data.prepare import prepare

SENTINELS = 6


@pytest.fixture
def config(byte_tokenizer, tmp_path):
  definition = json.loads(byte_tokenizer.read_text())
  plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
  # As T5 has them: the first is the highest id.
  definition["added_tokens"] += [
    {"id": 256 + SENTINELS - n, "content": f"<extra_id_{n}>", **plain} for n in reversed(range(SENTINELS))
  ]
  (tmp_path / "tokenizer").mkdir()
  (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(definition))
  (tmp_path / "texts").mkdir()
  for i in range(20):
    (tmp_path / "texts" / f"{i}.txt").write_text("abcdefgh " * 40)
  made = DataConfig(
    f"{tmp_path}/out",
    (SourceConfig(path=f"{tmp_path}/texts/*.txt", name="s"),),
    TokenizerConfig(f"{tmp_path}/tokenizer"),
    task="span_corruption",
    packing="none",
    heldout_fraction=0.2,
  )
  prepare(made, log=str)
  return made


def spans(seq_len, mean=3.0):
  return span_counts(tokens_that_fill(seq_len, 0.15, mean), 0.15, mean)[1]


def longest_that_fits():
  return max(seq_len for seq_len in range(20, 400) if spans(seq_len) <= SENTINELS)


def test_sentinels_that_suffice(config):
  seq_len = longest_that_fits()
  batches = train_batches(config, batch_size=4, seq_len=seq_len, seed=0)
  for _ in range(5):
    inputs = next(batches)["encoder_inputs"]
    used = np.unique(inputs[inputs > 256])
    assert used.min() >= 257 and used.max() == 256 + SENTINELS


def test_sentinels_that_run_out(config):
  seq_len = longest_that_fits() + 1
  for read in (train_batches, heldout_batches):
    settings = {"seed": 0} if read is train_batches else {}
    with pytest.raises(DataError, match=f"up to {SENTINELS + 1} noise spans, and the tokenizer has {SENTINELS} sent"):
      read(config, batch_size=4, seq_len=seq_len, **settings)
  # What the message says helps.
  mean = CorruptionConfig(mean_span=5.0)
  assert spans(seq_len, 5.0) <= SENTINELS
  train_batches(dataclasses.replace(config, corruption=mean), batch_size=4, seq_len=seq_len, seed=0)
  past = CorruptionConfig(sentinel_id=256 + 2 * SENTINELS + 10)
  train_batches(dataclasses.replace(config, corruption=past), batch_size=4, seq_len=seq_len, seed=0)

"""Held-out batches: every token scored once, and bits per byte of a known model."""

import dataclasses
import math

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import open_prepared


def framed(config, name=""):
  prepared = open_prepared(config)
  for source in prepared.sources:
    documents = prepared.documents(source, "heldout")
    for i in range(len(documents) if name in ("", source.name) else 0):
      yield [prepared.start_id, *documents.record(i).tokens.tolist(), prepared.eos_id]


def scored(batches):
  return sorted(
    (int(i), int(t), float(w))
    for batch in batches
    for i, t, w, s in zip(*(batch[n].ravel() for n in ("inputs", "targets", "loss_weights", "segment_ids")))
    if s
  )


def expected(config, name=""):
  return sorted((i, t, 1.0) for ids in framed(config, name) for i, t in zip(ids[:-1], ids[1:]))


@pytest.mark.parametrize("seq_len", [16, 100, 5000])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_each_token_is_scored_once(config, seq_len, batch_size):
  batches = heldout_batches(config, batch_size=batch_size, seq_len=seq_len)
  rows = list(batches)
  assert len(rows) == len(batches)
  assert all(array.shape == (batch_size, seq_len) for batch in rows for array in batch.values())
  assert scored(rows) == expected(config)
  assert sum(batch["loss_weights"].sum() for batch in rows) == batches.tokens
  assert batches.bytes == len(open_prepared(config).heldout_path.read_bytes())


def test_windows_restart_positions_and_do_not_overlap(config):
  for batch in heldout_batches(config, batch_size=4, seq_len=32):
    for row in range(4):
      ids, positions = batch["segment_ids"][row], batch["positions"][row]
      for segment in range(1, ids.max() + 1):
        assert positions[ids == segment].tolist() == list(range((ids == segment).sum()))


def test_iterates_again_the_same(config):
  batches = heldout_batches(config, batch_size=4, seq_len=32)
  for first, second in zip(batches, batches, strict=True):
    for name in first:
      np.testing.assert_array_equal(first[name], second[name])


def test_sources_apart(mixture):
  both = heldout_batches(mixture, batch_size=2, seq_len=64)
  parts = {
    s.name: heldout_batches(mixture, batch_size=2, seq_len=64, source=s.name) for s in open_prepared(mixture).sources
  }
  for name, part in parts.items():
    assert scored(part) == expected(mixture, name)
    # The byte tokenizer has one token a byte, and EOS stands for none.
    assert part.bytes == part.tokens - len(list(framed(mixture, name)))
  assert sum(part.bytes for part in parts.values()) == both.bytes
  assert scored(both) == expected(mixture)


@pytest.mark.parametrize("rows", [(0, 1, 2), (1, 3, 4), (4,), range(5), np.array([0, 4])], ids=str)
@pytest.mark.parametrize("max_batches", [0, 2])
def test_a_host_reads_its_rows_and_counts_what_all_score(mixture, rows, max_batches):
  """Of every batch, the last one that is not full included; bytes and tokens are those of all hosts."""
  settings = dict(batch_size=5, seq_len=64, max_batches=max_batches)
  whole, part = heldout_batches(mixture, **settings), heldout_batches(mixture, **settings, rows=rows)
  assert (part.bytes, part.tokens, len(part)) == (whole.bytes, whole.tokens, len(whole))
  if not max_batches:
    assert not list(whole)[-1]["segment_ids"][-1].any()
  for batch, mine in zip(whole, part, strict=True):
    for name in batch:
      np.testing.assert_array_equal(mine[name], batch[name][list(rows)])


def test_part_of_the_batches_counts_part_of_the_bytes(mixture):
  """One token is one byte here, so bytes must follow the tokens that were scored (EOS apart)."""
  whole = heldout_batches(mixture, batch_size=2, seq_len=64)
  part = heldout_batches(mixture, batch_size=2, seq_len=64, max_batches=3)
  assert len(part) == len(list(part)) == 3 < len(whole)
  assert sum(batch["loss_weights"].sum() for batch in part) == part.tokens
  assert part.bytes == pytest.approx(part.tokens, rel=0.02)
  many = heldout_batches(mixture, batch_size=2, seq_len=64, max_batches=10**6)
  assert (len(many), many.bytes) == (len(whole), whole.bytes)


def test_bits_per_byte_of_the_uniform_model(config):
  """Closed form: log2(vocabulary) bits per token, EOS included, over the raw bytes."""
  prepared = open_prepared(config)
  batches = heldout_batches(config, batch_size=4, seq_len=64)
  nats = sum(float(batch["loss_weights"].sum()) * math.log(prepared.vocab_size) for batch in batches)
  info = prepared.sources[0].heldout
  wanted = math.log2(prepared.vocab_size) * (info.tokens + info.documents) / info.bytes
  assert nats / math.log(2) / batches.bytes == pytest.approx(wanted)


def test_errors(config, mixture):
  with pytest.raises(DataError, match="no held-out documents of source 'third'"):
    heldout_batches(mixture, batch_size=2, seq_len=8, source="third")
  with pytest.raises(ConfigError, match="must be ascending row numbers of a batch of 3"):
    heldout_batches(mixture, batch_size=3, seq_len=8, rows=(2, 3))
  with pytest.raises(DataError, match="prepared with another data.heldout_fraction"):
    heldout_batches(dataclasses.replace(config, heldout_fraction=0.0), batch_size=2, seq_len=8)


@pytest.mark.parametrize("max_batches", [0, 4])
def test_a_batch_is_of_one_source(mixture, max_batches):
  """And what is said of each source is what its batches hold."""
  batches = heldout_batches(mixture, batch_size=3, seq_len=64, max_batches=max_batches)
  texts = {name: {(i, t) for i, t, _ in expected(mixture, name)} for name in ("first", "second")}
  tokens = dict.fromkeys(texts, 0.0)
  for batch, name in zip(batches, batches.sources, strict=True):
    assert {(i, t) for i, t, _ in scored([batch])} <= texts[name]
    tokens[name] += float(batch["loss_weights"].sum())
  assert set(batches.sources) == set(texts)  # the first batches too are of both
  assert sum(tokens.values()) == batches.tokens
  assert sum(batches.source_bytes.values()) == batches.bytes
  for name, size in batches.source_bytes.items():
    assert size == pytest.approx(tokens[name], rel=0.03)  # a token is a byte; EOS is none

"""The training batches: every token once, mixture, hosts, epochs, and exact resume in every mode."""

import dataclasses
import hashlib
import itertools
import json

import grain
import numpy as np
import pytest

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.config import DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.data.prepare import prepare

PACKINGS = ("split", "first_fit", "best_fit", "none")
NAMES = {"inputs", "targets", "positions", "segment_ids", "loss_weights"}


def open_batches(config, batch_size=4, seq_len=64, seed=0, **settings):
  return train_batches(config, batch_size=batch_size, seq_len=seq_len, seed=seed, **settings)


def take(iterator, count=None):
  return list(itertools.islice(iterator, count))


def same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys() == NAMES
    for name in NAMES:
      np.testing.assert_array_equal(a[name], b[name])


def segments(batches):
  """(inputs, targets, positions, weights) of every segment of every row."""
  for batch in batches:
    for row in range(len(batch["inputs"])):
      ids = batch["segment_ids"][row]
      for segment in range(1, ids.max() + 1):
        at = np.flatnonzero(ids == segment)
        assert np.array_equal(at, np.arange(at[0], at[0] + len(at)))
        yield tuple(batch[name][row][at] for name in ("inputs", "targets", "positions", "loss_weights"))


def train_documents(config):
  prepared = open_prepared(config)
  for source in prepared.sources:
    documents = prepared.documents(source, "train")
    for i in range(len(documents)):
      yield documents.record(i).tokens


def pairs_of(config):
  """Every (input, target) of the corpus, by the definition: start, tokens, EOS."""
  prepared = open_prepared(config)
  for tokens in train_documents(config):
    framed = [prepared.start_id, *tokens.tolist(), prepared.eos_id]
    yield from zip(framed[:-1], framed[1:])


@pytest.mark.parametrize("packing", PACKINGS[:3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_token_is_a_target_once_per_epoch_and_none_crosses(config, packing, shuffle):
  config = dataclasses.replace(config, packing=packing, shuffle=shuffle, epochs=1)
  batches = take(open_batches(config))
  found = []
  for inputs, targets, positions, weights in segments(batches):
    assert np.array_equal(positions, np.arange(len(positions)))
    assert np.array_equal(inputs[1:], targets[:-1])  # one stretch of one document
    assert (weights == 1).all()
    found += zip(inputs.tolist(), targets.tolist())
  assert sorted(found) == sorted(pairs_of(config))
  for batch in batches:
    padding = batch["segment_ids"] == 0
    for name in ("inputs", "targets", "positions", "loss_weights"):
      assert not batch[name][padding].any()


@pytest.mark.parametrize("packing", PACKINGS)
def test_shapes_and_types(config, packing):
  batch = next(open_batches(dataclasses.replace(config, packing=packing), batch_size=6, seq_len=32))
  assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
    name: ((6, 32), "float32" if name == "loss_weights" else "int32") for name in NAMES
  }


@pytest.mark.parametrize("packing", PACKINGS[1:3])
def test_short_documents_stay_whole(config, packing):
  config = dataclasses.replace(config, packing=packing, epochs=1)
  found = sorted(tuple(targets) for _, targets, _, _ in segments(take(open_batches(config, seq_len=4096))))
  eos = open_prepared(config).eos_id
  assert found == sorted((*tokens, eos) for tokens in train_documents(config))


def test_none_truncates_and_says_so(config):
  config = dataclasses.replace(config, packing="none", epochs=1)
  iterator = open_batches(config, seq_len=50)
  found = sorted(tuple(targets) for _, targets, _, _ in segments(take(iterator)))
  eos = open_prepared(config).eos_id
  assert found == sorted((*tokens, eos)[:50] for tokens in train_documents(config))
  dropped = sum(max(0, len(tokens) + 1 - 50) for tokens in train_documents(config))
  assert iterator.dropped_tokens == {"words": dropped} and dropped > 0
  assert open_batches(dataclasses.replace(config, packing="split")).dropped_tokens == {"words": 0}


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_are_reshuffled_and_counted(config, packing):
  config = dataclasses.replace(config, packing=packing, epochs=2)
  iterator = open_batches(config, batch_size=1)
  rows = take(iterator, iterator.rows_per_epoch)
  assert iterator.epochs == 1.0
  second = take(iterator)
  assert len(second) == iterator.rows_per_epoch
  assert iterator.epochs == 2.0
  order = [[batch["inputs"].tobytes() for batch in epoch] for epoch in (rows, second)]
  assert order[0] != order[1]
  tokens = [sorted(np.concatenate([b["targets"][b["segment_ids"] > 0] for b in epoch])) for epoch in (rows, second)]
  np.testing.assert_array_equal(*tokens)


def test_epochs_may_be_fractions_and_end_in_empty_rows(config):
  iterator = open_batches(dataclasses.replace(config, epochs=0.5), batch_size=7)
  rows = -(-iterator.rows_per_epoch // 2)
  assert rows % 7
  batches = take(iterator)
  assert len(batches) == -(-rows // 7)
  filled = np.concatenate([batch["segment_ids"].any(axis=1) for batch in batches])
  assert filled[:rows].all() and not filled[rows:].any()
  assert iterator.epochs == rows / iterator.rows_per_epoch


def test_without_shuffle_documents_come_in_order(config):
  iterator = open_batches(dataclasses.replace(config, shuffle=False, packing="none"), batch_size=1)
  for tokens, batch in zip(train_documents(config), iterator):
    n = min(len(tokens), 63)
    np.testing.assert_array_equal(batch["targets"][0][:n], tokens[:n])


def test_seeds_differ_and_repeat(config):
  first, again, other = (take(open_batches(config, seed=seed), 3) for seed in (0, 0, 1))
  same(first, again)
  assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(first, other))


def rows_of(batches, rows):
  return [{name: array[list(rows)] for name, array in batch.items()} for batch in batches]


# Blocks, as hosts along the data axis have them; apart, as devices in another order give; the same rows on hosts
# that share them, of a batch that the number of hosts does not divide.
@pytest.mark.parametrize("rows", [(0, 1, 2), (3, 4, 5, 6), (0, 1, 4, 6), (6,), range(7), np.array([1, 5])], ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_host_reads_its_rows_of_each_batch(mixture, packing, rows):
  """The last batch, which is not full, included."""
  config = dataclasses.replace(mixture, packing=packing, epochs=1)
  whole = take(open_batches(config, batch_size=7))
  assert not whole[-1]["segment_ids"][-1].any()
  same(take(open_batches(config, batch_size=7, rows=rows)), rows_of(whole, rows))


@pytest.mark.parametrize("name", ["config", "mixture"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_resume_continues_identically(request, name, packing):
  config = dataclasses.replace(request.getfixturevalue(name), packing=packing)
  iterator = open_batches(config)
  start = iterator.get_state()
  head = take(iterator, 5)
  state = json.loads(json.dumps(iterator.get_state()))
  tail = take(iterator, 25)  # beyond the first epoch of the small sources
  fresh = open_batches(config)
  fresh.set_state(state)
  same(take(fresh, 25), tail)
  iterator.set_state(state)  # back, in the iterator itself
  same(take(iterator, 25), tail)
  iterator.set_state(start)
  same(take(iterator, 5), head)


@pytest.mark.parametrize("packing", ["split", *(pytest.param(p, marks=pytest.mark.slow) for p in PACKINGS[1:])])
def test_workers_give_the_same_batches_and_resume(mixture, packing):
  config = dataclasses.replace(mixture, packing=packing, epochs=2)
  expected = take(open_batches(config))
  assert len(expected) > 12
  working = open_batches(dataclasses.replace(config, workers=2, prefetch=4))
  same(take(working, 7), expected[:7])
  state = working.get_state()
  working.close()
  for workers in (2, 0):  # a run may go on with another number of workers
    resumed = open_batches(dataclasses.replace(config, workers=workers))
    resumed.set_state(state)
    same(take(resumed), expected[7:])
    assert resumed.epochs == 2.0
    resumed.close()


def test_resume_with_other_hosts_and_batch_size(mixture):
  expected = take(open_batches(mixture, batch_size=1), 24)
  iterator = open_batches(mixture, batch_size=8)
  next(iterator)
  resumed = open_batches(mixture, batch_size=4, rows=(1, 3))
  resumed.set_state(iterator.get_state())
  rows = [expected[8 + i] for i in (1, 3, 5, 7)]
  same(
    [{name: np.concatenate([rows[i][name], rows[i + 1][name]]) for name in NAMES} for i in (0, 2)],
    take(resumed, 2),
  )


@pytest.mark.parametrize(
  "before, after, workers", [((0, 1), (0, 1, 2, 3), 0), ((1, 3), (0, 2), 1), ((0, 1, 2, 3), (3,), 0)]
)
def test_resume_on_another_mesh_goes_on_with_the_same_batches(mixture, before, after, workers):
  """The place in the data says nothing of the rows that the host which saved it was reading."""
  expected = take(open_batches(mixture), 6)
  iterator = open_batches(mixture, rows=before)
  same(take(iterator, 3), rows_of(expected[:3], before))
  resumed = open_batches(dataclasses.replace(mixture, workers=workers), rows=after)
  resumed.set_state(json.loads(json.dumps(iterator.get_state())))
  same(take(resumed, 3), rows_of(expected[3:], after))
  resumed.close()


def test_resume_refuses_other_data(config, mixture):
  state = open_batches(config).get_state()
  for other in (
    open_batches(mixture),
    open_batches(config, seq_len=32),
    open_batches(config, seed=1),
    open_batches(dataclasses.replace(config, packing="none")),
  ):
    with pytest.raises(DataError, match="belongs to other data settings"):
      other.set_state(state)


def source_of(mixture):
  """Which source a row came from, by what its documents hold."""
  prepared = open_prepared(mixture)
  texts = {}
  for source in prepared.sources:
    documents = prepared.documents(source, "train")
    texts[source.name] = b"\0".join(
      documents.record(i).tokens.astype(np.uint8).tobytes() for i in range(len(documents))
    )

  def which(row):
    piece = row["targets"][row["segment_ids"] == 1][:40]
    data = piece[piece < 256].astype(np.uint8).tobytes()
    [name] = [name for name, text in texts.items() if data in text]
    return name

  return which


def test_mixture_weights_are_shares_of_rows(mixture):
  config = dataclasses.replace(mixture, packing="best_fit")
  iterator = open_batches(config, batch_size=1, seq_len=128)
  which = source_of(mixture)
  rows = [which({name: array[0] for name, array in batch.items()}) for batch in take(iterator, 280)]
  assert 205 <= rows.count("first") <= 215  # 3 : 1
  prepared = open_prepared(mixture)
  epochs = iterator.source_epochs
  first, second = (epochs[s.name] * s.train.tokens for s in prepared.sources)
  assert first / second == pytest.approx(3, rel=0.1)
  assert epochs["first"] > 1 > epochs["second"]


def test_weight_zero_leaves_a_source_out(mixture):
  weights = lambda *ws: dataclasses.replace(  # noqa: E731
    mixture, sources=tuple(dataclasses.replace(s, weight=w) for s, w in zip(mixture.sources, ws))
  )
  assert set(open_batches(weights(0, 1)).source_epochs) == {"second"}
  with pytest.raises(ConfigError, match="no data source has a weight above 0"):
    open_batches(weights(0, 0))
  for weight in (-1, float("nan"), float("inf")):
    with pytest.raises(ConfigError, match="it must be a number that is not negative"):
      weights(weight, 1)


def test_errors(config):
  for rows in ((), (0, 5), (-1, 0), (1, 0), (1, 1)):
    with pytest.raises(ConfigError, match="must be ascending row numbers of a batch of 5"):
      open_batches(config, batch_size=5, rows=rows)
  with pytest.raises(ConfigError, match="data.epochs is 0"):
    open_batches(dataclasses.replace(config, epochs=0))
  with pytest.raises(DataError, match="no prepared data"):
    open_batches(dataclasses.replace(config, dir="nowhere"))


def test_close(config):
  iterator = open_batches(config)
  assert isinstance(iterator, grain.DatasetIterator)
  next(iterator)
  iterator.close()
  with pytest.raises(ValueError, match="closed"):
    next(iterator)


GOLDEN = {
  "split": "625275a3ac74bd16",
  "first_fit": "08de72d5617cbe61",
  "best_fit": "e1bde2fb7c81e252",
  "none": "7558b8a794e264b4",
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_batches_are_the_same_everywhere(packing, byte_tokenizer, tmp_path):
  """Golden: another Python, numpy or grain must not change the order of a run that resumes."""
  for i in range(30):
    (tmp_path / f"{i}.txt").write_text(f"document {i} " * (7 * i % 13 + 1))
  source = SourceConfig(path=f"{tmp_path}/*.txt", name="golden")
  tokenizer = TokenizerConfig(path=str(byte_tokenizer))
  config = DataConfig(f"{tmp_path}/out", (source,), tokenizer, heldout_fraction=0.1, packing=packing, epochs=2)
  prepare(config, log=lambda line: None)
  digest = hashlib.sha256()
  for batch in open_batches(config, batch_size=2, seq_len=48, seed=7):
    for name in sorted(NAMES):
      digest.update(batch[name].tobytes())
  assert digest.hexdigest()[:16] == GOLDEN[packing]

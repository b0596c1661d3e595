"""Rows of every task: what they hold, and that they depend on seed and index alone."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.config import CorruptionConfig, DataConfig, SourceConfig, TokenizerConfig
from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import open_prepared
from jaxllm.data.pipeline import train_batches
from jaxllm.data.prepare import prepare
from jaxllm.data.python_functions import python_functions
from jaxllm.data.tasks import empty_row

V, SEQ = 340, 64  # of the tokenizer in conftest, and positions of a row
MASK, SENTINEL = V, V + 20
TASKS = {
  "masking": dict(task="masking", corruption=CorruptionConfig(rate=0.2, mask_id=MASK)),
  "masking-packed": dict(task="masking", packing="best_fit", corruption=CorruptionConfig(rate=0.2, mask_id=MASK)),
  "spans": dict(task="span_corruption", packing="best_fit", corruption=CorruptionConfig(sentinel_id=SENTINEL)),
  "denoising": dict(task="denoising", packing="first_fit", corruption=CorruptionConfig(rate=0.3, mask_id=MASK)),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """Prepared: 40 pairs, the target the source's words backwards."""
  root = tmp_path_factory.mktemp("pairs")
  draw = np.random.default_rng(0)
  with open(root / "pairs.jsonl", "w") as file:
    for i in range(40):
      words = [f"w{n}" for n in draw.integers(0, 50, 1 + i)]
      file.write(json.dumps({"source": " ".join(words), "target": " ".join(words[::-1][:8])}) + "\n")
  config = DataConfig(
    dir=str(root / "data"),
    sources=(SourceConfig(kind="jsonl", path=str(root / "pairs.jsonl")),),
    tokenizer=TokenizerConfig(vocab_size=272),
    heldout_fraction=0.2,
    task="pairs",
    packing="best_fit",
    target_len=24,
  )
  prepare(config, log=lambda line: None)
  return config


def take(config, count, **settings):
  settings = dict(batch_size=4, seq_len=SEQ, seed=0) | settings
  return list(itertools.islice(train_batches(config, **settings), count))


def same(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("name", TASKS)
def test_rows_depend_on_seed_and_index_alone(config, name):
  """Two hosts hold what one holds; a resumed iterator goes on with the same rows; each epoch draws anew."""
  config = dataclasses.replace(config, **TASKS[name])
  whole = take(config, 6)
  expected = empty_row(config, SEQ)
  for batch in whole:
    assert {n: (x.shape[1:], x.dtype) for n, x in batch.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
  same(take(config, 6, rows=(0, 3)), [{n: x[[0, 3]] for n, x in batch.items()} for batch in whole])

  first = train_batches(config, batch_size=4, seq_len=SEQ, seed=0)
  list(itertools.islice(first, 3))
  again = train_batches(config, batch_size=2, seq_len=SEQ, seed=0)
  again.set_state(first.get_state())
  halves = list(itertools.islice(again, 6))
  same(whole[3:], [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(halves[::2], halves[1::2])])
  with pytest.raises(DataError, match="place in the data"):
    other = dataclasses.replace(config, corruption=dataclasses.replace(config.corruption, rate=0.25))
    train_batches(other, batch_size=4, seq_len=SEQ, seed=0).set_state(first.get_state())

  still = dataclasses.replace(config, shuffle=False)
  rows = train_batches(still, batch_size=1, seq_len=SEQ, seed=0)
  epoch = list(itertools.islice(rows, 2 * rows.rows_per_epoch))
  key = "inputs" if "masking" in name else "encoder_inputs"
  differ = [(a[key] != b[key]).any() for a, b in zip(epoch[: len(epoch) // 2], epoch[len(epoch) // 2 :])]
  assert np.mean(differ) > 0.9


def documents_of(config):
  prepared = open_prepared(config)
  documents = [prepared.documents(source, "train") for source in prepared.sources]
  return [d.framed(i) for d in documents for i in range(len(d))]


def sorted_tokens(arrays):
  return np.sort(np.concatenate(list(arrays)))


@pytest.mark.parametrize("name", ["masking", "masking-packed"])
def test_masked_rows_hold_every_token_once_and_never_choose_special_ones(config, name):
  config = dataclasses.replace(config, **TASKS[name], shuffle=False, epochs=1)
  batches = take(config, None)
  real = np.concatenate([b["targets"][b["segment_ids"] > 0] for b in batches])
  np.testing.assert_array_equal(np.sort(real), sorted_tokens(documents_of(config)))
  for b in batches:
    chosen = b["loss_weights"] > 0
    np.testing.assert_array_equal(b["inputs"][~chosen], b["targets"][~chosen])
    assert not np.isin(b["targets"][chosen], [0, 1, 2]).any()


def test_span_rows_put_every_document_together_again(config):
  config = dataclasses.replace(config, **TASKS["spans"], epochs=1)
  batches = take(config, None)
  restored = []
  for b in batches:
    for row in range(len(b["inputs"])):
      for segment in range(1, b["segment_ids"][row].max() + 1):
        inputs = b["encoder_inputs"][row][b["encoder_segment_ids"][row] == segment]
        at = b["segment_ids"][row] == segment
        targets, shifted = b["targets"][row][at], b["inputs"][row][at]
        assert inputs[-1] == targets[-1] == 2 and shifted[0] == 0
        np.testing.assert_array_equal(shifted[1:], targets[:-1])
        spans = np.split(targets[:-1], np.flatnonzero(targets[:-1] >= V))[1:]
        pieces = {int(span[0]): span[1:] for span in spans}
        restored += [pieces[int(i)] if i >= V else [i] for i in inputs[:-1]]
  np.testing.assert_array_equal(sorted_tokens(restored), sorted_tokens(d[1:-1] for d in documents_of(config)))
  # A document longer than a row fills rows on both sides.
  assert any((b["encoder_segment_ids"] == 1).all(1).any() and (b["loss_weights"] == 1).all(1).any() for b in batches)


def test_denoising_rows_write_every_document(config):
  config = dataclasses.replace(config, **TASKS["denoising"], epochs=1)
  batches = take(config, None)
  written = np.concatenate([b["targets"][b["loss_weights"] > 0] for b in batches])
  np.testing.assert_array_equal(np.sort(written[written != 2]), sorted_tokens(d[1:-1] for d in documents_of(config)))
  read = np.concatenate([b["encoder_inputs"][b["encoder_segment_ids"] > 0] for b in batches])
  gone = 1 - (read > 2).sum() / (written > 2).sum() + (read == MASK).sum() / (written > 2).sum()
  assert abs(gone - 0.3) < 0.01


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_pairs_stay_together(pairs, packing):
  config = dataclasses.replace(pairs, packing=packing, epochs=1)
  tokenizer = open_prepared(config).tokenizer()
  rows = 0
  for b in take(config, None, seq_len=96):
    for row in range(4):
      rows += b["segment_ids"][row].max() > 0
      for segment in range(1, b["segment_ids"][row].max() + 1):
        read = b["encoder_inputs"][row][b["encoder_segment_ids"][row] == segment]
        written = b["targets"][row][b["segment_ids"][row] == segment]
        assert read[0] == 1 and read[-1] == 2 and written[-1] == 2
        source, target = tokenizer.decode(read).split(), tokenizer.decode(written).split()
        if len(read) < 96 and len(written) < 24:
          assert target == source[::-1][:8]
  prepared = open_prepared(config)
  documents = prepared.total("train", "documents")
  assert rows == documents if packing == "none" else rows < documents
  batches = train_batches(config, batch_size=4, seq_len=16, seed=0)
  assert batches.dropped_tokens["pairs"] > 0
  heldout = heldout_batches(config, batch_size=4, seq_len=96)
  assert sum(b["loss_weights"].sum() for b in heldout) > 0


def classified(root, words, task, rows, **settings):
  """Prepared examples, with the tokenizer of the config `words`."""
  (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = DataConfig(
    dir=str(root / "data"),
    sources=(SourceConfig(kind="jsonl", path=str(root / "rows.jsonl"), fields=settings.pop("fields", ())),),
    tokenizer=TokenizerConfig(path=str(open_prepared(words).tokenizer_dir)),
    heldout_fraction=0.0,
    task=task,
    packing="none",
    shuffle=False,
    **settings,
  )
  prepare(config, log=lambda line: None)
  return config


def test_two_texts_and_a_label(config, tmp_path):
  rows = [{"a": "one two " * (i + 1), "b": "three", "y": "no" if i % 2 else "yes"} for i in range(8)]
  config = classified(tmp_path, config, "classification", rows, fields=("a", "b", "y"), labels=("no", "yes"))
  tokenizer = open_prepared(config).tokenizer()
  for i, b in enumerate(take(config, 8, batch_size=1, seq_len=24)):
    assert b["targets"].shape == b["loss_weights"].shape == (1,) and b["targets"][0] == 1 - i % 2
    ids = b["inputs"][0][b["segment_ids"][0] > 0]
    types = b["token_types"][0][b["segment_ids"][0] > 0]
    assert ids[0] == 1 and ids[-1] == 2 and list(ids).count(2) == 2
    assert tokenizer.decode(ids[types == 1]) == "three"
    assert rows[i]["a"].startswith(tokenizer.decode(ids[types == 0]))


def test_labels_of_words_stand_on_their_first_token(config, tmp_path):
  rows = [{"words": ["Ada", "Lovelace", "wrote", "programs"], "labels": [1, 2, 0, -100]}] * 4
  config = classified(tmp_path, config, "token_classification", rows)
  tokenizer = open_prepared(config).tokenizer()
  (b,) = take(config, 1, batch_size=1, seq_len=64)
  at = np.flatnonzero(b["loss_weights"][0])
  assert b["targets"][0][at].tolist() == [1, 2, 0]
  ids = b["inputs"][0]
  assert [tokenizer.decode(ids[i:j]).split()[0] for i, j in zip(at, [*at[1:], None])][:2] == ["Ada", "Lovelace"]


def test_mistakes_are_explained(config, tmp_path):
  masked = dataclasses.replace(config, task="masking")
  with pytest.raises(DataError, match="data.corruption.mask_id to an id past its 340 tokens"):
    take(masked, 1)
  low = dataclasses.replace(config, **TASKS["spans"] | dict(corruption=CorruptionConfig(sentinel_id=V + 1)))
  with pytest.raises(DataError, match="raise it to at least"):
    take(low, 1)
  with pytest.raises(ConfigError, match="best_fit"):
    dataclasses.replace(config, task="span_corruption")
  with pytest.raises(ConfigError, match="'none'"):
    dataclasses.replace(config, task="classification", packing="best_fit")
  with pytest.raises(DataError, match="label 'maybe' is not one of data.labels"):
    classified(tmp_path, config, "classification", [{"text": "a b", "label": "maybe"}] * 3, labels=("no", "yes"))
  with pytest.raises(DataError, match="plain text"):
    prepare(dataclasses.replace(config, dir=str(tmp_path / "x"), task="pairs", packing="none"))


def test_python_functions():
  source = b'''
class A:
  def method(self, x):
    """Doubles
    it."""
    return 2 * x

def plain(): "on its line"

def bare():
  return 1
'''
  (row,) = python_functions(source, "pkg/sub/mod.py")
  assert row == {
    "name": "method",
    "docstring": "Doubles\nit.",
    "code": "  def method(self, x):\n    return 2 * x\n",
    "module": "pkg.sub.mod",
    "package": "pkg",
  }
  assert not list(python_functions(b"def broken(:", "x.py"))

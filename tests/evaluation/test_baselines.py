"""Bars for bits per byte: against the command-line compressors' libraries, and hand-computed probabilities."""

import gzip
import lzma
import math
import random

import numpy as np
import pytest

from jaxllm.evaluation import baselines
from jaxllm.evaluation.baselines import ByteNGram, gzip_bits_per_byte, xz_bits_per_byte
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.heldout import heldout_metrics

TEXT = b"the quick brown fox jumps over the lazy dog; " * 40


def test_compressors_count_what_their_tools_write():
  assert gzip_bits_per_byte(TEXT) == pytest.approx(8 * len(gzip.compress(TEXT, 9, mtime=0)) / len(TEXT))
  assert xz_bits_per_byte(TEXT) == 8 * len(lzma.compress(TEXT, preset=9 | lzma.PRESET_EXTREME)) / len(TEXT)


def test_witten_bell_by_hand():
  # "aab": unigrams a 2, b 1 (2 types); after "a": a once, b once (2 types); after "b": nothing seen.
  model = ByteNGram(order=1).fit(b"aab")
  unigram_a, unigram_b = (2 + 2 / 256) / 5, (1 + 2 / 256) / 5
  expected = [unigram_a, (1 + 2 * unigram_b) / 4, unigram_b]
  np.testing.assert_allclose(model.probabilities(b"abb"), expected, rtol=1e-12)
  unseen = ByteNGram(order=0).fit(b"aab").probabilities(b"z")
  np.testing.assert_allclose(unseen, [2 / 256 / 5], rtol=1e-12)


@pytest.mark.parametrize("order", [0, 2, 5])
def test_probabilities_sum_to_one_in_every_context(order):
  draw = random.Random(order)
  text = bytes(draw.choices(b"abc \n", k=500))
  model = ByteNGram(order).fit(text)
  for context in (b"ab cab", b"zzzzzz", b"a\nb\nab"):
    total = sum(model.probabilities(context + bytes([byte]))[-1] for byte in range(256))
    assert total == pytest.approx(1)


def test_higher_orders_fit_repeating_text_better():
  bits = [ByteNGram(order).fit(TEXT).bits_per_byte(TEXT) for order in (0, 1, 3)]
  assert bits == sorted(bits, reverse=True) and bits[-1] < 1


def test_an_order_that_does_not_fit_a_word_is_refused():
  with pytest.raises(ValueError, match="8"):
    ByteNGram(order=8)


def test_heldout_metrics_weigh_batches_by_their_tokens():
  sums = {0: (np.float32(10.0), np.float32(5.0)), 1: (np.float32(2.0), np.float32(1.0))}
  batches = type("Batches", (list,), {"bytes": 24})([{"id": 0}, {"id": 1}])
  metrics = heldout_metrics(CausalLM(), lambda batch: {"nll": sums[batch["id"]]}, batches, prefix="x/")
  assert metrics == {
    "x/loss": pytest.approx(2.0),
    "x/perplexity": pytest.approx(math.exp(2)),
    "x/bits_per_byte": pytest.approx(12 / math.log(2) / 24),
  }


def test_text_in_pieces_is_text(monkeypatch):
  """Whatever the pieces and blocks are."""
  monkeypatch.setattr(baselines, "_BLOCK", 70)
  draw = random.Random(1)
  whole = bytes(draw.choices(b"abcd \n", k=1500))
  pieces = [whole[start : start + draw.randint(1, 50)] for start in range(1)]
  at = len(pieces[0])
  while at < len(whole):
    pieces.append(whole[at : at + draw.randint(0, 60)])
    at += len(pieces[-1])
  assert b"".join(pieces) == whole
  for measure in (gzip_bits_per_byte, xz_bits_per_byte):
    assert measure(iter(pieces)) == measure(whole)
  model, by_pieces = (ByteNGram(3).fit(text) for text in (whole, iter(pieces)))
  assert by_pieces.bits_per_byte(iter(pieces)) == pytest.approx(model.bits_per_byte(whole), rel=1e-12)
  grams, counts = np.unique(np.frombuffer(whole, np.uint8), return_counts=True)
  assert by_pieces.tables[0][0].tolist() == grams.tolist() and by_pieces.tables[0][1].tolist() == counts.tolist()
  exact = -np.log2(model.probabilities(whole)).mean()
  assert by_pieces.bits_per_byte(whole) == pytest.approx(exact, rel=1e-12)


def test_figures_of_each_source_come_from_its_batches():
  sums = [(10.0, 5.0), (2.0, 1.0), (6.0, 4.0)]
  batches = type("Batches", (list,), {"bytes": 24, "sources": ["a", "b", "a"], "source_bytes": {"a": 20, "b": 4}})(
    [0, 1, 2]
  )
  metrics = heldout_metrics(CausalLM(), lambda n: {"nll": tuple(map(np.float32, sums[n]))}, batches, prefix="eval/")
  assert metrics["eval/loss"] == pytest.approx(18 / 10)
  assert metrics["eval/a/loss"] == pytest.approx(16 / 9) and metrics["eval/b/loss"] == pytest.approx(2)
  assert metrics["eval/a/bits_per_byte"] == pytest.approx(16 / math.log(2) / 20)
  assert metrics["eval/b/bits_per_byte"] == pytest.approx(2 / math.log(2) / 4)
  batches.sources = ["a"] * 3
  assert not any(
    name.startswith("eval/a/")
    for name in heldout_metrics(CausalLM(), lambda n: {"nll": tuple(map(np.float32, sums[n]))}, batches)
  )

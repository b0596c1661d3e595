"""The corruptions against their definitions: what can be undone is undone, what is drawn follows its law."""

import itertools
import math

import numpy as np
import pytest

from jaxllm.data import corruption
from jaxllm.data.words import words_of

MASK = 999


def rng(seed=0):
  return np.random.default_rng(seed)


def close(count, trials, probability):
  """Within five standard deviations of a binomial's mean."""
  return abs(count - trials * probability) < 5 * math.sqrt(trials * probability * (1 - probability))


def test_masked_words_are_whole_and_as_many_as_asked_for():
  T, rows, rate = 400, 300, 0.15
  tokens, words = np.arange(T), np.repeat(np.arange(T), rng(1).integers(1, 6, T))[:T]
  words[::50] = -1
  chosen_words, masked, swapped, kept = 0, 0, 0, 0
  draw = rng()
  for _ in range(rows):
    out, chosen = corruption.mask_words(tokens, words, draw, rate=rate, mask_id=MASK, random_ids=np.arange(500, 600))
    assert not chosen[words == -1].any()
    for word in np.unique(words[words >= 0]):
      assert len(set(chosen[words == word])) == 1
    np.testing.assert_array_equal(out[~chosen], tokens[~chosen])
    assert ((out == tokens) | (out == MASK) | ((out >= 500) & (out < 600))).all()
    chosen_words += len(np.unique(words[chosen]))
    masked += (out[chosen] == MASK).sum()
    kept += (out[chosen] == tokens[chosen]).sum()
    swapped += ((out[chosen] >= 500) & (out[chosen] < 600)).sum()
  total = masked + kept + swapped
  assert close(chosen_words, rows * len(np.unique(words[words >= 0])), rate)
  assert close(masked, total, 0.8) and close(kept, total, 0.1) and close(swapped, total, 0.1)


def test_every_token_is_masked_equally_often():
  """In words of 1 and of 9 tokens alike: the expected share of tokens is the rate exactly."""
  words = np.repeat([0, 1, 2], [1, 9, 1])
  draw, counts, rows = rng(), np.zeros(11), 4000
  for _ in range(rows):
    counts += corruption.mask_words(np.zeros(11, int), words, draw, rate=0.3, mask_id=MASK, random_ids=np.arange(3))[1]
  assert all(close(count, rows, 0.3) for count in counts)


def test_lengths_are_those_of_t5():
  """568 tokens fill 512 inputs and give 114 targets: the numbers of T5's pretraining (arXiv 1910.10683, 3.1.4)."""
  assert corruption.tokens_that_fill(512, 0.15, 3.0) == 568
  assert corruption.span_lengths(568, 0.15, 3.0) == (512, 114)


@pytest.mark.parametrize("rate, mean_span", [(0.15, 3.0), (0.5, 3.0), (0.15, 32.0), (0.9, 2.0)])
def test_spans_have_fixed_totals_and_can_be_put_back(rate, mean_span):
  for length in (1, 2, 3, 7, 50, 511):
    for seed in range(10):
      tokens = rng(seed).integers(0, 900, length)
      noise = corruption.draw_spans(length, rng(seed), rate, mean_span)
      inputs, targets = corruption.corrupt_spans(tokens, noise, MASK)
      assert (len(inputs) + 1, len(targets) + 1) == corruption.span_lengths(length, rate, mean_span)
      count, spans = corruption.span_counts(length, rate, mean_span)
      assert noise.sum() == count
      sentinels = MASK - np.arange(spans)
      np.testing.assert_array_equal(inputs[inputs > 900], sentinels)
      np.testing.assert_array_equal(targets[targets > 900], sentinels)
      pieces = dict(zip(sentinels, np.split(targets, np.flatnonzero(targets > 900))[1:]))
      restored = [pieces[i][1:] if i > 900 else [i] for i in inputs]
      np.testing.assert_array_equal(np.concatenate(restored), tokens)


@pytest.mark.parametrize("seq_len", [8, 64, 128, 513])
def test_inputs_fill_the_encoder(seq_len):
  tokens = corruption.tokens_that_fill(seq_len, 0.15, 3.0)
  assert corruption.span_lengths(tokens, 0.15, 3.0)[0] <= seq_len < corruption.span_lengths(tokens + 1, 0.15, 3.0)[0]


def test_span_lengths_are_random_compositions():
  """Of 6 noise tokens in 2 spans the first has 1 to 5, each as likely."""
  draw, firsts, rows = rng(), [], 5000
  for _ in range(rows):
    noise = corruption.draw_spans(40, draw, 0.15, 3.0)
    firsts.append(len(next(list(g) for on, g in itertools.groupby(noise) if on)))
  assert all(close(firsts.count(n), rows, 0.2) for n in range(1, 6))


def test_infilling_removes_the_share_asked_for_in_poisson_spans():
  n, draw = 20_000, rng()
  tokens = np.arange(n)
  out = corruption.infill(tokens, draw, rate=0.3, mask_id=-1, mean_span=3.0)
  kept = out[out >= 0]
  assert len(kept) == n - 0.3 * n and (np.diff(kept) > 0).all()
  # A mask between two kept tokens is one span, of the length of the gap.
  single = (out[1:-1] == -1) & (out[:-2] >= 0) & (out[2:] >= 0)
  gaps = (out[2:] - out[:-2] - 1)[single]
  for length in range(8):
    assert close((gaps == length).sum(), len(gaps), math.exp(-3) * 3**length / math.factorial(length)), length


def test_infilling_never_lengthens_and_keeps_the_expected_rate():
  draw, gone, rows = rng(), 0, 4000
  for _ in range(rows):
    out = corruption.infill(np.arange(5), draw, rate=0.3, mask_id=-1, mean_span=0.4)
    assert len(out) <= 5
    gone += 5 - (out >= 0).sum()
  assert abs(gone / rows - 1.5) < 5 * 0.5 / math.sqrt(rows)


def test_masking_and_deletion_hit_every_token_alike():
  tokens, draw, n = np.arange(50_000), rng(), 50_000
  masked = corruption.mask_tokens(tokens, draw, rate=0.2, mask_id=-1)
  np.testing.assert_array_equal(masked[masked >= 0], tokens[masked >= 0])
  assert close((masked == -1).sum(), n, 0.2)
  left = corruption.delete_tokens(tokens, draw, rate=0.2)
  assert close(len(left), n, 0.8) and (np.diff(left) > 0).all()


def test_sentences_take_every_order_equally_often():
  tokens, ends = np.array([1, 2, 9, 3, 9, 4]), np.array([0, 0, 1, 0, 1, 0], bool)
  draw, rows = rng(), 6000
  seen = [tuple(corruption.permute_sentences(tokens, ends, draw).tolist()) for _ in range(rows)]
  orders = {sum(order, ()) for order in itertools.permutations([(1, 2, 9), (3, 9), (4,)])}
  assert set(seen) == orders
  assert all(close(seen.count(order), rows, 1 / 6) for order in orders)


# Where words begin, by each kind of vocabulary


def test_words_of_wordpiece():
  import tokenizers
  from tokenizers import models, normalizers, pre_tokenizers

  from jaxllm.data.tokenizers import HuggingFaceTokenizer

  pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "well", "."]
  tokenizer = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
  tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
  tokenizer.add_special_tokens(pieces[:5])
  wrapped = HuggingFaceTokenizer(tokenizer.to_str())
  ids = np.array([2, 5, 6, 7, 8, 9, 3, 5])  # [CLS] play ##ing ##s well . [SEP] play
  words = words_of(wrapped)
  assert words.number(ids).tolist() == [-1, 1, 1, 1, 2, 3, -1, 5]
  assert words.ends_sentence[9] and not words.ends_sentence[5]


def test_words_of_byte_level(byte_tokenizer):
  from jaxllm.data.tokenizers import load_tokenizer

  tokenizer = load_tokenizer(byte_tokenizer)
  words = words_of(tokenizer)
  numbers = words.number(tokenizer.encode("ab c\nd.")).tolist()
  # a space begins a word and, being one of its own here, ends one; so does a line's end
  assert numbers == [0, 0, 1, 2, 3, 4, 4]
  assert words.number(np.array([97, 256, 97])).tolist() == [0, -1, 2]
  assert words.number(tokenizer.encode("abc"), whole=False).tolist() == [0, 1, 2]


def test_words_of_sentencepiece(config):
  from jaxllm.data.manifest import open_prepared

  tokenizer = open_prepared(config).tokenizer()
  text = "word1 word22 return x"
  ids = tokenizer.encode(text)
  numbers = words_of(tokenizer).number(ids)
  joined = [tokenizer.decode(ids[numbers == n]) for n in np.unique(numbers)]
  assert [word.strip() for word in joined if word.strip()] == text.split()

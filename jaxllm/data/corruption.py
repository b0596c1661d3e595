"""What is done to text so that a model can learn to undo it: masking, span corruption, denoising.

Pure functions of a row of token ids and a random generator; nothing here knows of batches or tokenizers.
"""

import numpy as np
from jaxtyping import Bool, Int

Tokens = Int[np.ndarray, " T"]


def mask_words(
  tokens: Tokens, words: Tokens, rng: np.random.Generator, *, rate: float, mask_id: int, random_ids: Tokens
) -> tuple[Tokens, Bool[np.ndarray, " T"]]:
  """BERT's masking (Devlin et al., arXiv 1810.04805, section 3.1), whole words at a time.

  Each word is chosen on its own with probability `rate`, which is then also the probability of every token.
  Of the chosen tokens 80 % become `mask_id`, 10 % one of `random_ids`, 10 % stay.

  Args:
    words: the number of the word that each token belongs to, from 0; -1: never chosen.

  Returns:
    The masked tokens, and which tokens are to be predicted.
  """
  draws = rng.random(int(words.max(initial=-1)) + 2)  # one more, for -1 to point at
  chosen = (words >= 0) & (draws[words] < rate)
  fate = rng.random(len(tokens))
  replaced = rng.choice(random_ids, len(tokens))
  masked = np.where(chosen & (fate < 0.8), mask_id, tokens)
  return np.where(chosen & (fate >= 0.9), replaced, masked), chosen


def span_counts(length: int, rate: float, mean_span: float) -> tuple[int, int]:
  """How many of `length` tokens are noise, and in how many spans (T5, arXiv 1910.10683, section 3.1.4)."""
  noise = min(max(round(length * rate), 1), length - 1)
  return noise, min(max(round(noise / mean_span), 1), noise, length - noise)


def span_lengths(length: int, rate: float, mean_span: float) -> tuple[int, int]:
  """Lengths of what `corrupt_spans` makes of `length` tokens, each with one EOS more."""
  noise, spans = span_counts(length, rate, mean_span)
  return length - noise + spans + 1, noise + spans + 1


def tokens_that_fill(seq_len: int, rate: float, mean_span: float) -> int:
  """The most tokens that fit an encoder of `seq_len` once corrupted (T5's `random_spans_helper`)."""
  length = 1
  while span_lengths(length + 1, rate, mean_span)[0] <= seq_len:
    length += 1
  return length


def draw_spans(length: int, rng: np.random.Generator, rate: float, mean_span: float) -> Bool[np.ndarray, " T"]:
  """Which tokens are noise: spans and the text between them are random compositions of fixed totals."""
  noise, spans = span_counts(length, rate, mean_span)
  if not spans:
    return np.zeros(length, bool)

  def cut(total):
    return np.diff(np.concatenate([[0], np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1, [total]]))

  lengths = np.stack([cut(length - noise), cut(noise)], axis=1).ravel()
  return np.repeat(np.tile([False, True], spans), lengths)


def corrupt_spans(tokens: Tokens, noise: Bool[np.ndarray, " T"], sentinel_id: int) -> tuple[Tokens, Tokens]:
  """Inputs with one sentinel in place of each span, and targets: each sentinel and the span it stands for.

  Sentinels count down from `sentinel_id`.
  """
  starts = noise & ~np.concatenate([[False], noise[:-1]])
  sentinels = sentinel_id - np.arange(starts.sum())
  inputs = tokens.copy()
  inputs[starts] = sentinels
  return inputs[~noise | starts], np.insert(tokens[noise], np.flatnonzero(starts[noise]), sentinels)


def infill(tokens: Tokens, rng: np.random.Generator, *, rate: float, mask_id: int, mean_span: float) -> Tokens:
  """BART's text infilling (Lewis et al., arXiv 1910.13461, section 2.2): one mask in place of each span.

  Lengths are Poisson(`mean_span`), a span of length 0 inserts a mask; spans are drawn until the expected
  share `rate` of the tokens is gone, the last one cut to fit. The result is never longer than `tokens`:
  masks for empty spans that would make it so are left out, which a row of ordinary length never meets.
  """
  budget = int(len(tokens) * rate + rng.random())
  drawn: list[int] = []
  while (left := budget - sum(drawn)) > 0:
    drawn.append(min(int(rng.poisson(mean_span)), left))
  lengths = np.array(drawn, int)
  lengths = np.delete(lengths, np.flatnonzero(lengths == 0)[: max(len(lengths) - budget, 0)])
  spans, kept = len(lengths), len(tokens) - budget
  # Spans and kept tokens in random order; `before` counts the kept tokens before each span.
  before = np.sort(rng.choice(kept + spans, spans, replace=False)) - np.arange(spans)
  starts = before + np.cumsum(lengths) - lengths
  gone = np.repeat(starts, lengths) + np.arange(budget) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  return np.insert(np.delete(tokens, gone), before, mask_id)


def mask_tokens(tokens: Tokens, rng: np.random.Generator, *, rate: float, mask_id: int) -> Tokens:
  """BART's token masking: each token becomes `mask_id` with probability `rate`."""
  return np.where(rng.random(len(tokens)) < rate, mask_id, tokens)


def delete_tokens(tokens: Tokens, rng: np.random.Generator, *, rate: float) -> Tokens:
  """BART's token deletion: each token goes with probability `rate`, and nothing marks the place."""
  return tokens[rng.random(len(tokens)) >= rate]


def permute_sentences(tokens: Tokens, ends: Bool[np.ndarray, " T"], rng: np.random.Generator) -> Tokens:
  """BART's sentence permutation: sentences, each up to a token of `ends`, in random order."""
  sentences = np.split(tokens, np.flatnonzero(ends) + 1)
  return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])

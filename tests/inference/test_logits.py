"""What changes logits, against transformers' processors and against formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxllm.base.errors import ConfigError
from jaxllm.inference.logits import logit_rules, pack, unpack
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.sampling import sampling_rows

V, T, ENDS = 70, 24, (3, 41)


def rules(settings, begins, limits=None, **others):
  count = len(settings)
  limits = [T] * count if limits is None else limits
  return logit_rules(settings, begins=begins, limits=limits, ends=[ENDS] * count, vocab_size=V, **others)


def applied(settings, history, begins, positions, logits, limits=None):
  own = rules(settings, begins, limits, sources=[source_of(row) for row in history])
  return np.asarray(jax.jit(lambda r, *x: r.apply(*x))(own, logits, positions, history))


def source_of(history):
  """What a row's completion was asked by, here its own tokens in another order."""
  return [int(token) for token in history[::-2]]


@functools.cache
def case(rows=48, tokens=6, seed=0):
  """Logits and histories of few different tokens, so that runs come again."""
  rng = np.random.default_rng(seed)
  history = rng.integers(0, tokens, (rows, T)).astype(np.int32)
  positions = rng.integers(1, T, rows).astype(np.int32)
  begins = np.array([rng.integers(1, p + 1) for p in positions], np.int32)
  return rng.normal(size=(rows, V)).astype(np.float32) * 3, history, begins, positions


def expected(settings, history, begins, position, logits, limit):
  """Of one row, by transformers."""
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process as hf

  s, seen = settings, torch.tensor(history[None, :position]).long()
  chain = []
  biased = {(int(i),): float(b) for i, b in (s.logit_bias or {}).items()} | (s.sequence_bias or {})
  chain += [hf.SequenceBiasLogitsProcessor(biased)] if biased else []
  source = torch.tensor(source_of(history))[None]
  chain += [hf.EncoderRepetitionPenaltyLogitsProcessor(p, source)] if (p := s.encoder_repetition_penalty) != 1 else []
  chain += [hf.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)] if s.repetition_penalty != 1 else []
  chain += [hf.NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size)] if s.no_repeat_ngram_size else []
  chain += [hf.EncoderNoRepeatNGramLogitsProcessor(n, source)] if (n := s.encoder_no_repeat_ngram_size) else []
  chain += [hf.NoBadWordsLogitsProcessor([list(ids) for ids in s.bad_words_ids])] if s.bad_words_ids else []
  chain += [hf.MinLengthLogitsProcessor(s.min_length, list(ENDS))] if s.min_length else []
  chain += [hf.MinNewTokensLengthLogitsProcessor(int(begins), s.min_tokens, list(ENDS))] if s.min_tokens else []
  if s.forced_eos_token_id is not None:
    chain += [hf.ForcedEOSTokenLogitsProcessor(int(limit), torch.tensor(s.forced_eos_token_id).reshape(-1))]
  if s.exponential_decay_length_penalty:
    chain += [hf.ExponentialDecayLengthPenalty(s.exponential_decay_length_penalty, list(ENDS), int(begins))]
  chain += [hf.SuppressTokensLogitsProcessor(list(s.suppress_tokens))] if s.suppress_tokens else []
  if s.begin_suppress_tokens:
    chain += [hf.SuppressTokensAtBeginLogitsProcessor(list(s.begin_suppress_tokens), int(begins))]
  chain += [hf.LogitNormalization()] if s.renormalize_logits else []
  out = torch.tensor(logits[None])
  for processor in chain:
    out = processor(seen, out)
  return out[0].numpy()


SETTINGS = [
  dict(repetition_penalty=1.7),
  dict(repetition_penalty=0.4),
  *(dict(no_repeat_ngram_size=n) for n in (1, 2, 3, 4, 30)),
  dict(logit_bias={0: 2.5, 5: -1.0, 69: float("-inf")}),
  dict(sequence_bias={(1, 2): 4.0, (0,): -2.0, (3, 3, 1): 1.5, (2, 2): -0.5, (0, 1, 2, 3, 4): 9.0}),
  dict(bad_words_ids=[[1], [2, 3], [4, 0], [1, 1, 5], [5, 5], [0, 0, 2]]),
  dict(min_tokens=6, stop_token_ids=ENDS),
  dict(min_length=15, stop_token_ids=ENDS),
  dict(suppress_tokens=[0, 33, 69]),
  dict(begin_suppress_tokens=[1, 2]),
  dict(forced_eos_token_id=41),
  dict(forced_eos_token_id=[41, 3]),
  dict(encoder_repetition_penalty=2.5, repetition_penalty=1.3),
  *(dict(encoder_no_repeat_ngram_size=n) for n in (1, 2, 3)),
  *(dict(exponential_decay_length_penalty=(start, factor)) for start, factor in ((0, 1.5), (4, 0.6))),
  dict(renormalize_logits=True, suppress_tokens=[4], min_tokens=3, exponential_decay_length_penalty=(1, 1.1)),
  dict(
    repetition_penalty=1.2,
    no_repeat_ngram_size=3,
    logit_bias={1: 1.0},
    bad_words_ids=[[4, 4]],
    min_tokens=3,
    suppress_tokens=[9],
    sequence_bias={(2, 5): -3.0},
  ),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_equals_transformers(settings):
  logits, history, begins, positions = case()
  limits = np.where(np.arange(len(begins)) % 2, positions + 1, T)  # every other row is at its last token
  one = SamplingParams(max_tokens=None, **settings)
  got = applied([one] * len(begins), history, begins, positions, logits, limits)
  changed = 0
  for i in range(len(begins)):
    want = expected(one, history[i], begins[i], positions[i], logits[i], limits[i])
    np.testing.assert_array_equal(np.isneginf(got[i]), np.isneginf(want))
    np.testing.assert_allclose(got[i], want, rtol=5e-6, atol=1e-6)
    changed += not np.array_equal(want, logits[i])
  assert changed or settings == dict(no_repeat_ngram_size=30)


def test_rows_with_different_settings_are_each_their_own():
  logits, history, begins, positions = case()
  each = [SamplingParams(max_tokens=None, **SETTINGS[i % len(SETTINGS)]) for i in range(len(begins))]
  got = applied(each, history, begins, positions, logits)
  for i, one in enumerate(each):
    want = expected(one, history[i], begins[i], positions[i], logits[i], T)
    np.testing.assert_allclose(got[i], want, rtol=5e-6, atol=1e-6)


def test_presence_and_frequency_count_what_was_drawn():
  """vLLM's formula: logits - frequency * count - presence * (count > 0), over the completion only."""
  logits, history, begins, positions = case()
  one = SamplingParams(presence_penalty=0.7, frequency_penalty=-0.3)
  got = applied([one] * len(begins), history, begins, positions, logits)
  for i, (begin, position) in enumerate(zip(begins, positions)):
    counts = np.bincount(history[i, begin:position], minlength=V)
    np.testing.assert_allclose(got[i], logits[i] + 0.3 * counts - 0.7 * (counts > 0), rtol=1e-5, atol=1e-6)


def test_only_allowed_tokens_and_those_of_a_grammar():
  logits, history, begins, positions = case()
  one = SamplingParams(allowed_token_ids=[0, 31, 32, 63, 64, 69], suppress_tokens=[31])
  got = applied([one] * len(begins), history, begins, positions, logits)
  assert {tuple(np.flatnonzero(np.isfinite(row))) for row in got} == {(0, 32, 63, 64, 69)}
  grammar = np.stack([pack([i % V, 64], V) for i in range(len(begins))])
  both = np.asarray(rules([one] * len(begins), begins).apply(logits, positions, history, grammar))
  for i, row in enumerate(both):
    assert set(np.flatnonzero(np.isfinite(row))) == {0, 32, 63, 64, 69} & {i % V, 64}


def test_forced_first_and_last_tokens():
  logits, history, _, _ = case(rows=4)
  one = SamplingParams(forced_bos_token_id=9, forced_eos_token_id=3, suppress_tokens=[9], max_tokens=None)
  got = applied([one] * 4, history, np.full(4, 5), np.array([5, 6, 18, 19]), logits, np.full(4, 20))
  finite = [np.flatnonzero(np.isfinite(row)).tolist() for row in got]
  usual = [i for i in range(V) if i != 9]
  assert finite == [[9], usual, usual, [3]]
  only = applied([one], history[:1], np.array([5]), np.array([5]), logits[:1], np.array([6]))  # the first is the last
  assert np.flatnonzero(np.isfinite(only[0])).tolist() == [3]
  # What may not begin a text does not follow the forced token either, as in transformers.
  one = SamplingParams(forced_bos_token_id=9, begin_suppress_tokens=[7])
  got = applied([one] * 3, history[:3], np.full(3, 5), np.array([5, 6, 7]), logits[:3])
  assert np.isneginf(got[:, 7]).tolist() == [True, True, False] and got[0, 9] == 0


def test_nothing_asked_for_changes_nothing():
  logits, history, begins, positions = case()
  got = applied([SamplingParams()] * len(begins), history, begins, positions, logits)
  np.testing.assert_array_equal(got, logits)


def test_packing():
  for size in (31, 32, 33, 64, 70):
    tokens = sorted({0, 5, size // 2, size - 1})
    assert np.flatnonzero(unpack(jnp.asarray(pack(tokens, size))[None], size)[0]).tolist() == tokens


def test_tokens_that_the_vocabulary_lacks_are_none():
  """An end, or a token never drawn, of a config that was written for another vocabulary; -1 says none."""
  assert np.flatnonzero(unpack(jnp.asarray(pack([-1, 5, 40, 900], 40))[None], 40)[0]).tolist() == [5]


def test_what_stands_behind_a_position_is_not_read():
  """So the positions of a draft can be drawn together: each row sees the draft's tokens before its own only."""
  logits, history, begins, positions = case()
  settings = [SamplingParams(seed=i, max_tokens=None, **SETTINGS[i % len(SETTINGS)]) for i in range(len(begins))]
  each = dict(begins=begins, limits=[T] * len(begins), ends=[ENDS] * len(begins), vocab_size=V)
  rows = sampling_rows(settings, [0] * len(begins), **each)
  want = rows.draw(logits, positions, history)
  behind = np.where(np.arange(T) < positions[:, None], history, V - 1 - history)
  np.testing.assert_array_equal(rows.draw(logits, positions, behind), want)
  order = np.random.default_rng(1).permutation(len(begins)).repeat(2)
  np.testing.assert_array_equal(rows.take(order).draw(logits[order], positions[order], history[order]), want[order])


def test_draws_follow_the_penalized_distribution():
  count, history = 20_000, np.array([1, 2, 2, 0], np.int32)
  logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
  one = SamplingParams(seed=4, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 1})
  each = dict(begins=[1] * count, limits=[9] * count, ends=[()] * count, vocab_size=4)
  rows = sampling_rows([one] * count, range(count), **each)
  tile = lambda x: jnp.broadcast_to(jnp.asarray(x), (count, *np.shape(x)))  # noqa: E731
  drawn = rows.draw(tile(logits), tile(np.int32(3)), tile(history))
  # Token 1 stands in the prompt, token 2 was drawn twice; both are negative, so the penalty multiplies them.
  changed = np.array([logits[0], logits[1] * 1.5, logits[2] * 1.5 - 2 * 0.5 - 0.25, logits[3] + 1], np.float64)
  weights = np.exp(changed) / np.exp(changed).sum()
  assert stats.chisquare(np.bincount(drawn, minlength=4), count * weights).pvalue > 1e-3


def test_no_token_left_is_told_apart():
  logits = np.array([[1, 2, 3], [1, np.nan, 3], [1, np.inf, 0], [1, 2, 3]], np.float32)
  settings = [SamplingParams(allowed_token_ids=[0], suppress_tokens=[0])] + [SamplingParams()] * 3
  for temperature in (0.0, 1.0):
    each = [SamplingParams(**(vars(one) | dict(temperature=temperature))) for one in settings]
    rows = sampling_rows(each, [0] * 4, begins=[1] * 4, limits=[9] * 4, ends=[()] * 4, vocab_size=3)
    drawn = rows.draw(logits, np.full(4, 2), np.zeros((4, 9), np.int32)).tolist()
    assert drawn[:3] == [-1, -1, -1] and drawn[3] >= 0


@pytest.mark.parametrize(
  "settings, sequences, message",
  [
    (dict(logit_bias={V: 1}), None, "logit_bias names token 70, but the model's vocabulary has 70"),
    (dict(bad_words_ids=[[1, 99]]), None, "bad_words_ids names token 99"),
    (dict(forced_eos_token_id=70), None, "forced_eos_token_id names token 70"),
    (dict(allowed_token_ids=[1, 71]), None, "allowed_token_ids names token 71"),
    (dict(logit_bias={1: 1, 2: 1, 3: 1}), (2, 1), "3 biased tokens and banned sequences; there is room for 2"),
    (dict(bad_words_ids=[[1, 2, 3]]), (2, 2), "sequence of 3 tokens; there is room for 2"),
  ],
)
def test_what_does_not_fit_is_refused(settings, sequences, message):
  with pytest.raises(ConfigError, match=message):
    rules([SamplingParams(**settings)], [1], sequences=sequences)


def test_one_compilation_serves_every_mix():
  logits, history, begins, positions = case()
  apply = jax.jit(lambda r, *x: r.apply(*x))
  room = dict(sequences=(8, 8), sources=[range(5)] * len(begins))
  for settings in SETTINGS:
    apply(rules([SamplingParams(max_tokens=None, **settings)] * 48, begins, **room), logits, positions, history)
  assert apply._cache_size() == 1

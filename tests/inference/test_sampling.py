"""Sampling against exact probabilities and against transformers' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxllm.base.errors import ConfigError
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.sampling import Cuts, filter_logits, sample, sampling_rows

LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]))


def arrays(rows, **settings):
  """[B] arrays of settings; one value is every row's."""
  usual = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, top_h=2.0, epsilon=0.0, eta=0.0)
  values = {k: np.broadcast_to(np.asarray(settings.get(k, d)), (rows,)) for k, d in usual.items()}
  return Cuts(**{k: jnp.asarray(v, jnp.int32 if k == "top_k" else jnp.float32) for k, v in values.items()})


def draw(settings, samples, logits, positions):
  """Tokens of rows whose prompts are one token."""
  count, vocab = logits.shape
  each = dict(begins=[1] * count, limits=[100] * count, ends=[()] * count)
  rows = sampling_rows(settings, samples, **each, vocab_size=vocab)
  return rows.draw(logits, positions, jnp.zeros((count, 100), jnp.int32))


@pytest.mark.parametrize(
  "settings, weights",
  [
    (dict(), [0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01]),
    (dict(temperature=0.5), [0.16, 0.0625, 0.0225, 0.01, 0.0036, 0.0009, 0.0001]),
    (dict(top_k=3), [0.4, 0.25, 0.15, 0, 0, 0, 0]),
    (dict(top_p=0.7), [0.4, 0.25, 0.15, 0, 0, 0, 0]),  # 0.65 is too little, 0.8 is enough
    (dict(top_p=0.3), [0.4, 0, 0, 0, 0, 0, 0]),  # the first token always stays
    (dict(top_k=2, top_p=0.6), [0.4, 0, 0, 0, 0, 0, 0]),  # 0.4 is 61% of what top-k leaves
    (dict(min_p=0.2), [0.4, 0.25, 0.15, 0.1, 0, 0, 0]),
    (dict(temperature=0.5, min_p=0.2), [0.16, 0.0625, 0, 0, 0, 0, 0]),  # the temperature comes first
    (dict(temperature=2.0, top_k=4, top_p=0.9, min_p=0.55), [0.4**0.5, 0.25**0.5, 0.15**0.5, 0, 0, 0, 0]),
    # The entropy is 1.57: surprises are nearest to it for 0.25 (1.39), then 0.15 (1.90), then 0.4 (0.92).
    (dict(typical_p=0.2), [0, 0.25, 0, 0, 0, 0, 0]),
    (dict(typical_p=0.3), [0, 0.25, 0.15, 0, 0, 0, 0]),
    (dict(typical_p=0.5), [0.4, 0.25, 0.15, 0, 0, 0, 0]),
    # Of the entropy of 1.548 0.367 is of 0.4, 0.347 of 0.25 and 0.285 of 0.15.
    (dict(top_h=0.5), [0.4, 0.25, 0, 0, 0, 0, 0]),
    (dict(top_h=0.2), [0.4, 0, 0, 0, 0, 0, 0]),  # the first token always stays
    (dict(epsilon=0.05), [0.4, 0.25, 0.15, 0.1, 0.06, 0, 0]),
    (dict(epsilon=0.5), [0.4, 0, 0, 0, 0, 0, 0]),
    (dict(eta=0.09), [0.4, 0.25, 0.15, 0.1, 0, 0, 0]),  # 0.3 * exp(-1.548) is 0.064
    (dict(top_k=2, typical_p=0.3), [0.4, 0, 0, 0, 0, 0, 0]),  # of what top-k leaves: 0.49 and 0.96 beside 0.67
  ],
)
def test_draws_follow_the_closed_form(settings, weights):
  expected = np.asarray(weights) / np.sum(weights)
  rows = 20_000
  logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (rows, len(LOGITS)))
  exact = jax.nn.softmax(filter_logits(logits[:1], arrays(1, **settings)), axis=-1)[0]
  np.testing.assert_allclose(exact, expected, atol=1e-6)
  keys = jax.random.split(jax.random.key(3), rows)
  drawn = np.bincount(jax.jit(sample)(logits, keys, arrays(rows, **settings)), minlength=len(LOGITS))
  assert drawn[expected == 0].sum() == 0
  if (expected > 0).sum() > 1:
    assert stats.chisquare(drawn[expected > 0], rows * expected[expected > 0]).pvalue > 1e-3


def test_support_is_that_of_transformers():
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process as hf

  rng = np.random.default_rng(0)
  rows, vocab = 64, 100
  logits = rng.normal(size=(rows, vocab)).astype(np.float32) * 3
  settings = dict(
    temperature=rng.uniform(0.3, 2.0, rows).astype(np.float32),
    top_k=rng.integers(0, 120, rows),
    top_p=rng.choice([1.0, 0.95, 0.7, 0.2], rows).astype(np.float32),
    min_p=rng.choice([0.0, 0.02, 0.3], rows).astype(np.float32),
    typical_p=rng.choice([1.0, 0.95, 0.5, 0.1], rows).astype(np.float32),
    top_h=rng.choice([2.0, 2.0, 0.9, 0.4], rows).astype(np.float32),
    epsilon=rng.choice([0.0, 0.0, 0.01, 0.2], rows).astype(np.float32),
    eta=rng.choice([0.0, 0.0, 0.01, 0.3], rows).astype(np.float32),
  )
  got = np.asarray(filter_logits(jnp.asarray(logits), arrays(rows, **settings)))
  for i in range(rows):
    want = torch.tensor(logits[i : i + 1])
    chain = [hf.TemperatureLogitsWarper(float(settings["temperature"][i]))]
    chain += [hf.TopHLogitsWarper(float(settings["top_h"][i]))] if settings["top_h"][i] <= 1 else []
    chain += [hf.TopKLogitsWarper(int(settings["top_k"][i]))] if settings["top_k"][i] else []
    chain += [hf.TopPLogitsWarper(float(settings["top_p"][i]))] if settings["top_p"][i] < 1 else []
    chain += [hf.MinPLogitsWarper(float(settings["min_p"][i]))] if settings["min_p"][i] > 0 else []
    chain += [hf.TypicalLogitsWarper(float(settings["typical_p"][i]))] if settings["typical_p"][i] < 1 else []
    chain += [hf.EpsilonLogitsWarper(float(settings["epsilon"][i]))] if settings["epsilon"][i] > 0 else []
    chain += [hf.EtaLogitsWarper(float(settings["eta"][i]))] if settings["eta"][i] > 0 else []
    for processor in chain:
      want = processor(None, want)
    np.testing.assert_allclose(jax.nn.softmax(got[i]), torch.softmax(want[0], -1).numpy(), atol=1e-6)


def test_ties_stay_and_infinities_are_never_drawn():
  logits = jnp.asarray([[1.0, 1.0, 1.0, -jnp.inf]])
  kept = filter_logits(logits, arrays(1, top_k=2))
  assert jnp.isfinite(kept).tolist() == [[True, True, True, False]]


def test_a_tiny_temperature_is_greedy_without_overflow():
  logits = jnp.asarray([[100.0, -200.0, 100.5]])
  assert sample(logits, jax.random.split(jax.random.key(0), 1), arrays(1, temperature=1e-30)).tolist() == [2]


def test_mixed_rows_draw_what_they_draw_alone():
  settings = [
    SamplingParams(seed=1, temperature=0),
    SamplingParams(seed=2, top_k=2),
    SamplingParams(seed=3, top_p=0.5, temperature=2.0),
    SamplingParams(seed=2**63 + 5, min_p=0.1),
  ]
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)), jnp.float32)
  positions = jnp.asarray([3, 9, 27, 4])
  together = draw(settings, [0, 1, 2, 0], logits, positions)
  for i, (one, number) in enumerate(zip(settings, [0, 1, 2, 0])):
    alone = draw([one], [number], logits[i : i + 1], positions[i : i + 1])
    assert alone[0] == together[i]
  assert together[0] == logits[0].argmax()


def test_streams_differ_by_seed_sample_and_position():
  def draws(seed, number, start):
    settings = [SamplingParams(seed=seed)] * 40
    return draw(settings, [number] * 40, jnp.zeros((40, 1000)), start + jnp.arange(40)).tolist()

  assert draws(1, 0, 0) == draws(1, 0, 0)
  assert draws(1, 0, 0)[1:] == draws(1, 0, 1)[:-1]
  assert len({tuple(draws(*a)) for a in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1 << 32, 0, 0)]}) == 4
  assert draws(None, 0, 0) != draws(None, 0, 0)


@pytest.mark.parametrize(
  "settings, name",
  [
    (dict(temperature=-0.1), "temperature"),
    (dict(temperature=float("nan")), "temperature"),
    (dict(temperature=float("inf")), "temperature"),
    (dict(temperature="hot"), "temperature"),
    (dict(top_k=-2), "top_k"),
    (dict(top_k=1.5), "top_k"),
    (dict(top_p=0), "top_p"),
    (dict(top_p=1.1), "top_p"),
    (dict(min_p=-0.1), "min_p"),
    (dict(max_tokens=0), "max_tokens"),
    (dict(n=0), "n is 0"),
    (dict(stop=""), "stop"),
    (dict(stop_token_ids=[-1]), "stop_token_ids"),
    (dict(seed=-1), "seed"),
    (dict(logprobs=-1), "logprobs"),
    (dict(prompt_logprobs=1.5), "prompt_logprobs"),
    (dict(n=3, best_of=2), "best_of is 2; it must be at least n"),
    (dict(typical_p=0), "typical_p"),
    (dict(repetition_penalty=0), "repetition_penalty"),
    (dict(presence_penalty=3), "presence_penalty is 3; it must be between -2 and 2"),
    (dict(frequency_penalty="much"), "frequency_penalty"),
    (dict(no_repeat_ngram_size=-1), "no_repeat_ngram_size"),
    (dict(logit_bias={"x": 1}), "logit_bias"),
    (dict(logit_bias={1: float("nan")}), "logit_bias"),
    (dict(logit_bias=[1]), "logit_bias"),
    (dict(sequence_bias={(): 1.0}), "sequence_bias"),
    (dict(bad_words=["a", ""]), "bad_words"),
    (dict(bad_words_ids=[[1], []]), "bad_words_ids"),
    (dict(bad_words_ids=[1]), "bad_words_ids"),
    (dict(allowed_token_ids=[]), "allowed_token_ids"),
    (dict(suppress_tokens=[-1]), "suppress_tokens"),
    (dict(forced_eos_token_id=True), "forced_eos_token_id"),
    (dict(min_tokens=17), "min_tokens is 17; it must be at most max_tokens"),
    (dict(min_length=5, max_length=4), "min_length"),
    (dict(skip_special_tokens="no"), "skip_special_tokens"),
    (dict(stop=5.5), "stop is 5.5"),
    (dict(structured_outputs="json"), "structured_outputs"),
    (dict(structured_outputs=dict(jsn={})), "structured_outputs"),
    (dict(structured_outputs=dict(regex="a"), forced_eos_token_id=1), "forced_eos_token_id"),
    (dict(structured_outputs=dict(regex="a"), num_beams=2), "structured_outputs"),
  ],
)
def test_impossible_settings_are_named(settings, name):
  with pytest.raises(ConfigError, match=name):
    SamplingParams(**settings)


def test_public_spellings():
  assert SamplingParams(stop="\n").stop == ("\n",)
  assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
  assert SamplingParams(stop=None, stop_token_ids=7).stop_token_ids == (7,)


@pytest.mark.parametrize("setting", ["top_p", "typical_p"])
def test_a_share_too_small_for_float32_keeps_a_token(setting):
  """As the smallest that it holds: with none left the first of the vocabulary was drawn."""
  logits = jnp.asarray([[-1e9, 0.0, 3.0, 0.0]] * 3)
  settings = [SamplingParams(**{setting: share}, seed=1) for share in (1e-50, 1e-40, 1e-30)]
  assert draw(settings, [0] * 3, logits, jnp.full(3, 1)).tolist() == [2, 2, 2]


def test_a_temperature_over_float32_draws_what_is_allowed():
  one = SamplingParams(temperature=1e39, top_k=1, allowed_token_ids=[2], seed=1)
  assert draw([one], [0], jnp.zeros((1, 4)), jnp.full(1, 1)).tolist() == [2]

"""Speculative decoding: the text is what it is without, and what the guesses are worth is told."""

import functools

import harness
import numpy as np
import oracle
import pytest
import test_engine
import test_families
from harness import Poisoned, greedy, serve
from test_engine import PROMPTS

from jaxllm.base.errors import ConfigError
from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.engine.speculation import DraftModel, Speculation
from jaxllm.inference.params import SamplingParams
from jaxllm.models.build import unstack_layers
from jaxllm.models.config import ModelConfig

NGRAM = Speculation("ngram", num_speculative_tokens=3, prompt_lookup_min=1, adaptive=False)
REPEATING = [[7, 8, 9] * 5, [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4], [20] * 9, [60, 61], list(range(80, 97))]


def small(kind="plain", vocab=101):
  """A draft model that is wrong often."""
  kinds = {"plain": {}, "local": dict(sliding_window=4)}
  config = ModelConfig(
    vocab_size=vocab, embed_dim=16, num_layers=1, num_heads=2, mlp_dim=16, max_seq_len=48, **kinds[kind]
  )
  return DraftModel(config, unstack_layers(oracle.random_params(config, 3)), oracle.XLA)


def draft(model, **settings):
  return Speculation("draft", num_speculative_tokens=3, draft=model, **dict(adaptive=False) | settings)


def requests(sampled):
  if not sampled:
    return [greedy(prompt, 12) for prompt in REPEATING]
  settings = [
    dict(temperature=0.7, top_k=5),
    dict(temperature=1.5, repetition_penalty=1.3, no_repeat_ngram_size=2),
    dict(temperature=0.3, frequency_penalty=0.5, presence_penalty=0.5),
    dict(temperature=1.0, top_p=0.8, logit_bias={5: 3.0}),
    dict(temperature=0.9, min_p=0.1, min_tokens=5, stop_token_ids=list(range(50))),
  ]
  return [
    Request(prompt, SamplingParams(seed=i, max_tokens=12, **one))
    for i, (prompt, one) in enumerate(zip(REPEATING, settings))
  ]


@functools.cache
def engine(kind, how):
  config, params = test_engine.model(kind)
  spec = {
    None: None,
    "ngram": NGRAM,
    "adaptive": Speculation("ngram", num_speculative_tokens=3, prompt_lookup_min=1),
    "draft": draft(small()),
    "local": draft(small("local", vocab=96)),
    "itself": draft(DraftModel(config, params, oracle.XLA)),
  }[how]
  return Poisoned(config, params, compute=oracle.XLA, num_pages=12, speculative=spec)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
  "kind, how",
  [("plain", "ngram"), ("window", "ngram"), ("sink-tokens", "ngram"), ("plain", "adaptive"), ("plain", "draft")]
  + [("window", "local"), ("window", "draft")],
)
def test_the_text_is_what_it_is_without(kind, how, sampled):
  """In batches that are preempted, read in parts and find each other's pages."""
  want = serve(engine(kind, None), requests(sampled))
  served = engine(kind, how)
  before = served.stats()
  assert serve(served, requests(sampled), waits=(0, 0, 3, 1)) == want
  assert serve(served, requests(sampled)) == want
  after = served.stats()
  assert after["draft_tokens"] > before["draft_tokens"]
  assert after["preemptions"] > before["preemptions"] or kind == "sink-tokens"


def test_a_model_that_guesses_for_itself_is_always_right():
  served = engine("plain", "itself")
  for sampled in (False, True):
    found = harness.answers(served, [requests(sampled)[3]])
    assert found[0].metrics.target_steps == 4  # one token behind the prompt, then 4 a step
  assert served.stats()["accepted_tokens"] == served.stats()["draft_tokens"] > 0


def test_repetition_takes_fewer_steps():
  served = engine("plain", "ngram")
  loop = next(p for p in REPEATING if len(set(test_engine.plain_loop("plain", p, 30)[-8:])) <= 3)
  (last,) = harness.answers(served, [greedy(loop, 30)])
  assert last.metrics.target_steps < 24


def test_log_probabilities_of_what_was_guessed():
  served = engine("plain", "ngram")
  wants = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2)
  found = {}
  number = served.submit(Request(REPEATING[0], wants))
  while served.busy:
    harness.collect(served.step(), found)
  drawn = [t for delta in found[number] for t in delta.token_ids]
  shown = [one for delta in found[number] for one in delta.logprobs]
  after = test_engine.log_probs("plain", (*REPEATING[0], *drawn))[len(REPEATING[0]) - 1 :]
  for row, token, one in zip(after, drawn, shown, strict=False):
    np.testing.assert_allclose([one[t] for t in one], row[list(one)], atol=1e-4)
    assert one[token].rank == 1


class Even:
  """A guide that wants even tokens, and ends after six."""

  def __init__(self):
    self.taken, self.finished = 0, False
    bits = np.zeros(128, bool)
    bits[:101:2] = True
    self.allowed = np.packbits(bits, bitorder="little").view("<u4")

  def take(self, token):
    assert token % 2 == 0
    self.taken += 1
    self.finished = self.taken == 6

  def allowed_after(self, drafts):
    return np.stack([self.allowed] * (len(drafts) + 1))


@pytest.mark.parametrize("how", [None, "ngram", "draft"])
def test_guided(how):
  served = engine("plain", how)
  settings = SamplingParams(temperature=1.0, seed=4, max_tokens=12)
  guided = [Request(prompt, settings, guide=Even()) for prompt in REPEATING[:3]]
  texts = serve(served, [*guided, greedy(REPEATING[3])])
  assert all(len(text) == 6 and not any(t % 2 for t in text) for text in texts[:3])
  assert texts[3] == test_engine.plain_loop("plain", REPEATING[3], 10)
  again = [Request(prompt, settings, guide=Even()) for prompt in REPEATING[:3]]
  assert serve(engine("plain", None), again) == texts[:3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3_text", "deepseek_v3", "bloom", "t5"])
def test_other_families(name):
  config, params, draw = test_families.case(name)
  asked = [prompt * 2 for prompt in test_families.prompts(config.vocab_size, (3, 5, 4))]
  served = Poisoned(config, params, compute=oracle.XLA, num_pages={"global": 16, "local": 16}, speculative=NGRAM)
  assert serve(served, [greedy(prompt, test_families.NEW) for prompt in asked]) == [draw(prompt) for prompt in asked]


def test_sampling_follows_the_distribution_with_guesses_too():
  """Chi-square of the second drawn token, which half of the time was guessed."""
  prompt, count = PROMPTS[1], 600
  served = engine("plain", "draft")
  settings = [SamplingParams(seed=seed, temperature=1.5, top_k=4, max_tokens=3) for seed in range(count)]
  drawn = serve(served, [Request(prompt, one) for one in settings])
  first = np.asarray([text[0] for text in drawn])
  p = top(test_engine.log_probs("plain", tuple(prompt))[-1])
  check(first, p)
  common = max(p, key=p.get)
  then = np.asarray([text[1] for text in drawn if text[0] == common])
  check(then, top(test_engine.log_probs("plain", (*prompt, common))[-1]))


def top(logprobs, temperature=1.5, k=4):
  ids = np.argsort(-logprobs)[:k]
  weights = np.exp(logprobs[ids] / temperature)
  return dict(zip(ids.tolist(), weights / weights.sum()))


def check(drawn, probabilities):
  assert set(drawn) <= set(probabilities)
  expected = np.asarray([p * len(drawn) for p in probabilities.values()])
  found = np.asarray([(drawn == token).sum() for token in probabilities])
  assert ((found - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom: one in a thousand


@pytest.mark.parametrize(
  "settings, message",
  [
    (dict(method="eagle"), "method is 'eagle'; it must be 'ngram' or 'draft'"),
    (dict(), "needs a method"),
    (dict(method="ngram", num_speculative_tokens=0), "num_speculative_tokens is 0"),
    (dict(method="ngram", prompt_lookup_min=5), "prompt_lookup_min is 5; it must be at most prompt_lookup_max .4"),
    (dict(method="draft"), "'draft' needs a model"),
    (dict(method="ngram", depth=1), "no setting 'depth'"),
  ],
)
def test_impossible_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    Speculation.of(settings)


def test_a_draft_model_that_does_not_fit():
  config, params = test_engine.model("sinks")
  short = small()
  short = DraftModel(ModelConfig(**vars(short.config) | {"max_seq_len": 20}), short.params, oracle.XLA)
  with pytest.raises(ConfigError, match="reads 20 tokens; max_model_len is 48"):
    Engine(config, params, speculative=draft(short), **harness.SMALL)
  all_local, weights = test_engine.model("sink-tokens")
  with pytest.raises(ConfigError, match="sees further back"):
    Engine(all_local, weights, speculative=draft(small()), **harness.SMALL)

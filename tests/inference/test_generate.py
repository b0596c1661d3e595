"""Cached, batched, padded generation against the plain loop over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from jaxllm.base.errors import ConfigError
from jaxllm.inference.generate import Generator
from jaxllm.inference.params import SamplingParams
from jaxllm.models.build import declare, stack_layers
from jaxllm.models.config import Compute

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
# One token, one below, at and above a bucket of 16.
PROMPTS = [[7], [3, 1, 4, 1, 5], list(range(40, 55)), list(range(60, 76)), list(range(80, 97))]


@functools.cache
def forward(name):
  graph, _, _ = tiny.model(name)
  return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens)[0])


def generate_tokens(graph, params, config, prompts, settings, eos_ids=(), **others):
  return Generator(graph, params, config, **others).complete(prompts, settings, eos_ids)


def plain_loop(name, prompt, count):
  """Argmax of the uncached logits, token after token, and the log-probabilities of each step."""
  _, params, config = tiny.model(name)
  ids, logprobs = list(prompt), []
  for _ in range(count):
    padded = np.zeros((1, config.max_seq_len), np.int32)
    padded[0, : len(ids)] = ids
    logits = forward(name)(params, padded)[0, len(ids) - 1]
    logprobs.append(np.asarray(jax.nn.log_softmax(logits)))
    ids.append(int(logits.argmax()))
  return tuple(ids[len(prompt) :]), logprobs


@pytest.mark.parametrize("name", tiny.MODELS)
def test_batched_and_cached_equals_the_plain_loop(name):
  done = generate_tokens(*tiny.model(name), PROMPTS, GREEDY)
  for prompt, completion in zip(PROMPTS, done, strict=True):
    assert completion.token_ids == plain_loop(name, prompt, 12)[0]
    assert (completion.finish_reason, completion.prompt_tokens) == ("length", len(prompt))
  assert len({completion.token_ids for completion in done}) == len(PROMPTS)


def test_stacked_parameters_serve_too():
  graph, params, config = tiny.model()
  settings = SamplingParams(temperature=0, max_tokens=2)
  stacked = generate_tokens(graph, stack_layers(params), config, PROMPTS, settings)
  assert stacked == generate_tokens(graph, params, config, PROMPTS, settings)


def test_log_probabilities_are_the_models():
  settings = SamplingParams(temperature=0.7, seed=5, max_tokens=12, logprobs=3, ignore_eos=True)
  _, params, config = tiny.model()
  for completion in generate_tokens(*tiny.model(), PROMPTS[:2], settings):
    ids = [*PROMPTS[completion.prompt_index]]
    for token, shown in zip(completion.token_ids, completion.logprobs, strict=True):
      padded = np.zeros((1, config.max_seq_len), np.int32)
      padded[0, : len(ids)] = ids
      want = np.asarray(jax.nn.log_softmax(forward("rope")(params, padded)[0, len(ids) - 1]))
      assert set(shown) == {token, *np.argsort(-want)[:3].tolist()}
      np.testing.assert_allclose([shown[i] for i in shown], want[list(shown)], atol=1e-4)
      ids.append(token)


def test_a_row_draws_the_same_in_any_batch():
  settings = [SamplingParams(seed=i, max_tokens=12, temperature=1.0 + i / 4, top_p=0.9) for i in range(5)]
  together = generate_tokens(*tiny.model(), PROMPTS, settings)
  for i in (1, 3):
    alone = generate_tokens(*tiny.model(), [PROMPTS[i]], settings[i])
    assert alone[0].token_ids == together[i].token_ids


def test_samples_of_one_prompt():
  settings = dict(seed=1, max_tokens=8, temperature=2.0)
  done = generate_tokens(*tiny.model(), PROMPTS[4:], SamplingParams(n=5, **settings))
  assert [(c.prompt_index, c.index) for c in done] == [(0, i) for i in range(5)]
  assert len({c.token_ids for c in done}) == 5
  same = generate_tokens(*tiny.model(), PROMPTS[4:] * 5, SamplingParams(**settings))
  assert [c.prompt_index for c in same] == [0, 1, 2, 3, 4]
  assert {c.token_ids for c in same} == {done[0].token_ids}


def test_the_models_limit_ends_a_completion():
  name = "learned"  # has no vectors for positions past the limit
  prompts = [[5] * 47, [6] * 20, [7]]
  done = generate_tokens(*tiny.model(name), prompts, SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
  assert [len(c.token_ids) for c in done] == [1, 28, 47]
  assert {c.finish_reason for c in done} == {"length"}
  for prompt, completion in zip(prompts, done):
    assert completion.token_ids == plain_loop(name, prompt, len(completion.token_ids))[0]


def test_rows_of_one_batch_end_apart():
  free, _ = plain_loop("rope", PROMPTS[1], 12)
  last = free[3]
  settings = [
    SamplingParams(temperature=0, max_tokens=2),
    SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[last]),
    *[SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)] * 3,
  ]
  done = generate_tokens(*tiny.model(), PROMPTS, settings, eos_ids=[free[4]])
  assert done[1].token_ids == free[: free.index(last) + 1]
  assert (done[1].finish_reason, done[1].stop_reason) == ("stop", last)
  assert [len(done[i].token_ids) for i in (0, 2, 3, 4)] == [2, 9, 9, 9]
  assert done[4].token_ids == plain_loop("rope", PROMPTS[4], 9)[0]


def test_the_end_of_text_token():
  free, _ = plain_loop("rope", PROMPTS[1], 12)
  end = free[5]
  args = (*tiny.model(), [PROMPTS[1]])
  done = generate_tokens(*args, SamplingParams(temperature=0, max_tokens=12), eos_ids=[end])[0]
  assert done.token_ids == free[: free.index(end) + 1]
  assert (done.finish_reason, done.stop_reason) == ("stop", None)
  assert generate_tokens(*args, GREEDY, eos_ids=[end])[0].token_ids == free


def test_text_streams_and_stops_at_a_string():
  tokenizer = tiny.ByteTokenizer()
  free = generate_tokens(*tiny.model(), [PROMPTS[1]], GREEDY, tokenizer=tokenizer)[0]
  assert free.text == tokenizer.decode(PROMPTS[1] + list(free.token_ids))[len(PROMPTS[1]) :]
  stop = free.text[4:7]
  assert free.text.find(stop) == 4
  settings = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
  deltas = list(Generator(*tiny.model(), tokenizer=tokenizer).stream([PROMPTS[1]], settings))
  done = deltas[-1].completion
  assert all(delta.completion is None for delta in deltas[:-1])
  assert "".join(delta.text for delta in deltas) == done.text == free.text[:4]
  assert sum((delta.token_ids for delta in deltas), ()) == done.token_ids == free.token_ids[: len(done.token_ids)]
  assert (done.finish_reason, done.stop_reason) == ("stop", stop)


def test_streams_share_an_engine():
  """Two at once, one of them given up, a third behind them."""
  generator = Generator(*tiny.model())
  first, second = generator.stream(PROMPTS[:2], GREEDY), generator.stream([PROMPTS[2]], GREEDY)
  assert next(first).token_ids and next(second).token_ids
  first.close()
  done = [delta.completion for delta in second if delta.completion is not None]
  assert [one.token_ids for one in done] == [plain_loop("rope", PROMPTS[2], 12)[0]]
  assert generator.complete([PROMPTS[1]], GREEDY)[0].token_ids == plain_loop("rope", PROMPTS[1], 12)[0]


def test_bfloat16_alone_is_padded_to_the_fast_path_and_draws_the_same():
  _, params, config = tiny.model()
  params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  graph, _, _ = declare(config, Compute(dtype="bfloat16"))
  facts = dict(compute=Compute(dtype="bfloat16"))
  alone = generate_tokens(graph, params, config, PROMPTS[:1], GREEDY, **facts)
  twice = generate_tokens(graph, params, config, [PROMPTS[0]] * 2, GREEDY, **facts)
  assert len(alone) == 1 and alone[0].token_ids == twice[0].token_ids == twice[1].token_ids


@pytest.mark.parametrize(
  "prompts, settings, message",
  [
    ([[]], GREEDY, "the prompt is empty"),
    ([[1], [0] * 48], GREEDY, "prompt 2 has 48 tokens.*sequence length is over the model's limit of 48"),
    ([[1, 258]], GREEDY, "holds token 258.*258 tokens"),
    ([[1], [-1]], GREEDY, "prompt 2 holds token -1"),
    ([[1], [2]], [GREEDY], "1 sampling settings for 2 prompts"),
    ([[1]], SamplingParams(stop="x"), "need a tokenizer"),
  ],
)
def test_mistakes_are_told_before_anything_runs(prompts, settings, message):
  with pytest.raises(ConfigError, match=message):
    Generator(*tiny.model()).stream(prompts, settings)


def test_no_prompts():
  assert generate_tokens(*tiny.model(), [], GREEDY) == []

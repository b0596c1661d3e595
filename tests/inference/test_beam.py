"""Encoder-decoder generation and beam search against `transformers`, token for token."""

import itertools

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.inference.params import SamplingParams

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers_models import CASES, MORE, V, models  # noqa: E402

NEW = 9
PROMPTS = [np.random.default_rng(n).integers(4, V, n).tolist() for n in (5, 11, 3)]


def transformers_generate(name, prompts, new=NEW, **settings):
  """(tokens up to the end, score) of each completion."""
  theirs, ours = models(name)
  pad, width = theirs.config.pad_token_id, max(map(len, prompts))
  decoder = ours.config.architecture == "decoder"
  rows = [[pad] * (width - len(p)) + p if decoder else p + [pad] * (width - len(p)) for p in prompts]
  keep = [[0] * (width - len(p)) + [1] * len(p) if decoder else [1] * len(p) + [0] * (width - len(p)) for p in prompts]
  out = theirs.generate(
    torch.tensor(rows),
    attention_mask=torch.tensor(keep),
    max_new_tokens=new,
    do_sample=False,
    output_scores=True,
    return_dict_in_generate=True,
    **settings,
  )
  found = out.sequences[:, width if decoder else 1 :].tolist()
  found = [tokens[: tokens.index(1) + 1] if 1 in tokens else tokens[:new] for tokens in found]
  return found, out.get("sequences_scores")


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration", *MORE])
def test_greedy(name):
  want, _ = transformers_generate(name, PROMPTS, new=20)
  got = models(name)[1].generate(PROMPTS, temperature=0, max_tokens=20)
  assert len({tuple(tokens) for tokens in want}) == len(PROMPTS)  # else the encoder goes unread
  assert [list(c.token_ids) for c in got] == want
  assert [c.prompt_tokens for c in got] == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize(
  "name, length_penalty, early_stopping",
  [*itertools.product(CASES, [0.0, 1.0, 2.5, -1.0], [False, True, "never"]), *((name, 1.0, True) for name in MORE)],
)
def test_beams(name, length_penalty, early_stopping):
  settings = dict(length_penalty=length_penalty, early_stopping=early_stopping, num_beams=3)
  want, scores = transformers_generate(name, PROMPTS, num_return_sequences=2, **settings)
  got = models(name)[1].generate(PROMPTS, n=2, max_tokens=NEW, **settings)
  assert [list(c.token_ids) for c in got] == want
  np.testing.assert_allclose([c.score for c in got], scores, rtol=1e-4)
  assert [(c.prompt_index, c.index) for c in got] == [(i, n) for i in range(len(PROMPTS)) for n in range(2)]


@pytest.mark.parametrize(
  "settings",
  [
    dict(no_repeat_ngram_size=2, min_length=4, forced_eos_token_id=1),
    dict(repetition_penalty=1.6, bad_words_ids=[[5], [6, 7]], suppress_tokens=[9], min_new_tokens=3),
    dict(forced_bos_token_id=8, begin_suppress_tokens=[4, 28], sequence_bias={(8, 11): 3.0, (12,): -2.0}),
  ],
)
@pytest.mark.parametrize("name", CASES)
def test_settings_that_change_logits(name, settings):
  prompts = PROMPTS[:1] if name.startswith("Llama") else PROMPTS  # padding would count as text there
  if name.startswith("Llama"):
    settings = {k: v for k, v in settings.items() if k != "forced_bos_token_id"}
    settings |= {"min_length": len(prompts[0]) + 4} if "min_length" in settings else {}
  want, scores = transformers_generate(name, prompts, num_beams=3, num_return_sequences=2, **settings)
  plain, _ = transformers_generate(name, prompts, num_beams=3, num_return_sequences=2)
  ours = {dict(min_new_tokens="min_tokens").get(k, k): v for k, v in settings.items()}
  got = models(name)[1].generate(prompts, num_beams=3, n=2, max_tokens=NEW, **ours)
  assert [list(c.token_ids) for c in got] == want != plain
  np.testing.assert_allclose([c.score for c in got], scores, rtol=1e-4)


@pytest.mark.parametrize("num_beams", [2, 7])
def test_numbers_of_beams(num_beams):
  name = "T5ForConditionalGeneration"
  want, _ = transformers_generate(name, PROMPTS, num_beams=num_beams)
  got = models(name)[1].generate(PROMPTS, num_beams=num_beams, max_tokens=NEW)
  assert [list(c.token_ids) for c in got] == want
  # Each prompt's result is its own: a batch changes nothing, and a stream hands out the same.
  alone = list(models(name)[1].stream(PROMPTS[1], num_beams=num_beams, max_tokens=NEW))
  assert [d.completion.token_ids for d in alone] == [got[1].token_ids]


def test_the_cases_end_early_and_late():
  """Else the tests above would not see how completions end."""
  for name in ("LlamaForCausalLM", "BartForConditionalGeneration"):
    found = models(name)[1].generate(PROMPTS, n=2, num_beams=3, max_tokens=NEW, length_penalty=0.0)
    assert len({len(c.token_ids) for c in found}) > 1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_beams=0), "num_beams is 0"),
    (dict(num_beams=2, n=3), "n is 3; it must be at most num_beams"),
    (dict(num_beams=2, stop="x"), "stop is"),
    (dict(num_beams=2, logprobs=1), "logprobs is 1"),
    (dict(num_beams=2, early_stopping="maybe"), "early_stopping is 'maybe'"),
  ],
)
def test_impossible_settings(settings, message):
  with pytest.raises(ConfigError, match=message):
    SamplingParams(**settings)


def test_searches_of_different_widths_and_draws_share_a_call():
  model = models("LlamaForCausalLM")[1]
  each = [SamplingParams(num_beams=2, max_tokens=NEW), SamplingParams(temperature=0, max_tokens=NEW)]
  each.append(SamplingParams(num_beams=4, n=2, max_tokens=NEW))
  alone = [one for prompt, own in zip(PROMPTS, each) for one in model.generate([prompt], own)]
  together = model.generate(PROMPTS, each)
  assert [one.token_ids for one in together] == [one.token_ids for one in alone]
  assert [one.prompt_index for one in together] == [0, 1, 2, 2]


def test_a_beam_computes_only_its_new_token():
  from jaxllm.inference import beam
  from jaxllm.inference.engine import Engine

  model = models("LlamaForCausalLM")[1]
  settings = SamplingParams(num_beams=3, max_tokens=NEW, ignore_eos=True)
  how = dict(page_size=1, max_logprobs=V, processed_logprobs=True, overlap=False, max_num_seqs=4)
  engine = Engine(model.config, model._weights, compute=model.compute, **how)
  list(beam.search(engine, PROMPTS[:1], [settings], None, ()))
  stats = engine.stats()
  # The prompt of 5 tokens, and then 3 beams at 8 places: all but the last token of each is found.
  assert stats["prefix_queries"] - stats["prefix_hits"] == 5 + 3 * 8
  assert stats["pages_free"] == stats["pages_total"]

"""Answers in vLLM's shape."""

import pickle

import numpy as np
import tiny_models as tiny

from jaxllm.inference.completions import Logprob, request_outputs
from jaxllm.inference.params import SamplingParams


def test_a_log_probability_is_a_number_with_a_rank():
  one = Logprob(-1.5, 2, "the")
  assert one == -1.5 and (one.logprob, one.rank, one.decoded_token) == (-1.5, 2, "the")
  again = pickle.loads(pickle.dumps(one))
  assert (again, again.rank, again.decoded_token) == (one, 2, "the")


def test_log_probabilities_have_ranks_and_texts():
  model = tiny.loose_model()
  done = model.generate("abc", SamplingParams(seed=3, temperature=3.0, max_tokens=12, logprobs=2, ignore_eos=True))[0]
  ids, total, ranks = model.prompt_ids("abc"), 0.0, set()
  for token, shown in zip(done.token_ids, done.logprobs, strict=True):
    logits = np.asarray(model(np.asarray([ids]))[0, -1], np.float64)
    want = logits - np.log(np.exp(logits).sum())
    for one, logprob in shown.items():
      assert logprob.rank == 1 + (want > want[one]).sum()
      np.testing.assert_allclose(logprob, want[one], atol=1e-4)
      assert logprob.decoded_token == model.tokenizer.decode([one])
    assert [shown[i].rank for i in shown if i != token] == [r for r in (1, 2) if r != shown[token].rank]
    total, ids = total + want[token], [*ids, token]
    ranks.add(shown[token].rank)
  np.testing.assert_allclose(done.cumulative_logprob, total, atol=1e-3)
  assert max(ranks) > 2  # else the chosen token would always be among the top ones


def test_answers_are_grouped_by_prompt():
  model = tiny.loose_model()
  prompts = ["ab", "c"]
  ids = [model.prompt_ids(prompt) for prompt in prompts]
  done = model.generate(prompts, n=2, seed=1, max_tokens=4)
  answers = request_outputs(done[::-1], prompts, ids)
  assert [(a.prompt, a.prompt_token_ids, a.finished) for a in answers] == [
    ("ab", tuple(ids[0]), True),
    ("c", tuple(ids[1]), True),
  ]
  assert [[(o.text, o.token_ids) for o in a.outputs] for a in answers] == [
    [(one.text, one.token_ids) for one in some] for some in (done[:2], done[2:])
  ]
  assert all(output.finished() for a in answers for output in a.outputs)

"""Accuracy on checked answers: the intervals against scipy's, the questions against their own verifiers."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.base.errors import ConfigError
from jaxllm.evaluation import verified

pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("right, n", [(0, 10), (3, 10), (10, 10), (50, 200)])
def test_wilsons_interval(right, n):
  from scipy.stats import binomtest

  want = binomtest(right, n).proportion_ci(0.95, "wilson")
  got = verified.accuracy(np.array([[1.0]] * right + [[0.0]] * (n - right)))
  assert (got.mean, got.questions, got.solved) == (right / n, n, right / n)
  assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-6)


def test_samples_of_a_question_are_not_independent():
  """Ten equal answers to each question tell no more than one."""
  once = verified.accuracy(np.array([[0.0], [1.0], [0.5], [1.0]]))
  tenfold = verified.accuracy(np.repeat([[0.0], [1.0], [0.5], [1.0]], 10, axis=1))
  assert (once.low, once.high) == (tenfold.low, tenfold.high)
  assert tenfold.solved == 0.5


@pytest.mark.parametrize(
  "text, answer",
  [
    ("7", "7"),
    ("First 3 + 4.\nAnswer: 7", "7"),
    ("answer: 6\nNo.\n**Answer:** 7.", "7"),
    ("<answer>1</answer> or <answer> 7 </answer>", "7"),
    ("Answer: -4", "-4"),
  ],
)
def test_the_answer_in_a_reply(text, answer):
  assert verified.answer_in(text) == answer


class Knows:
  """Answers as a model would that looks the answer up."""

  tokenizer = None

  def __init__(self, questions, wrong=()):
    self.answers, self.wrong = questions, wrong

  def prompt_ids(self, text):
    return text

  def generate(self, prompts, n, **settings):
    import reasoning_gym

    entries = {e["question"]: e["answer"] for e in reasoning_gym.create_dataset("chain_sum", size=12, seed=3)}

    def reply(prompt):
      question = prompt.split("\n\n" + verified.INSTRUCTION)[0]
      return "Answer: " + ("none" if prompt in self.wrong else entries[question])

    return [SimpleNamespace(prompt_index=i, text=reply(p)) for i, p in enumerate(prompts) for _ in range(n)]


def test_right_answers_are_right():
  questions = verified.questions_of(["chain_sum"], 12, 3)
  assert [q.text for q in questions] == [q.text for q in verified.questions_of(["chain_sum"], 12, 3)]
  wrong = [f"{questions[5].text}\n\n{verified.INSTRUCTION}\n"]
  scores = verified.scores_of(Knows(questions, wrong), questions, samples=2, batch_size=5)
  assert scores.shape == (12, 2) and (scores[5] == 0).all() and scores.sum() == 22


def test_unknown_task():
  with pytest.raises(ConfigError, match="no task 'sums'; it has "):
    verified.questions_of(["sums"], 1, 0)

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
  once = verified.accuracy(np.array([[0.0], [1.0], [0.0], [1.0]]))
  tenfold = verified.accuracy(np.repeat([[0.0], [1.0], [0.0], [1.0]], 10, axis=1))
  assert (once.low, once.high) == (tenfold.low, tenfold.high)
  assert tenfold.solved == 0.5


def test_no_answer_right_is_not_certain():
  """Nor is every question's half: Wilson's interval, of as many as there are questions."""
  from scipy.stats import binomtest

  for score, right in ((0.0, 0), (1.0, 10), (0.5, 5)):
    want = binomtest(right, 10).proportion_ci(0.95, "wilson")
    got = verified.accuracy(np.full((10, 4), score))
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-6)


def test_a_little_for_wrong_answers_is_not_certain():
  """None of ten is solved: that a third can be is within the interval."""
  got = verified.accuracy(np.array([[0.01]] * 9 + [[0.02]]))
  assert got.mean == pytest.approx(0.011) and got.high > binomial_limit(10)


def binomial_limit(n):
  """What share, solved in none of n questions, has a chance of 5%."""
  return 1 - 0.05 ** (1 / n)


def test_sampled_intervals_cover_the_truth():
  """Questions of different difficulty, few of them and rarely solved, with four answers to each."""
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(1000):
    found = verified.accuracy(rng.random((20, 4)) < rng.beta(1, 9, (20, 1)))  # their mean is 0.1
    covered += found.low <= 0.1 <= found.high
  assert covered >= 930


@pytest.mark.parametrize("task", ["rotate_matrix", "n_queens", "sentence_reordering", "tower_of_hanoi", "gcd"])
@pytest.mark.parametrize("reply", ["Hm.\nAnswer: {}", "**Answer:** {}\n", "Answer:\n{}", "<answer>{}</answer>"])
def test_every_right_answer_is_found(task, reply):
  import reasoning_gym

  answers = [entry["answer"] for entry in reasoning_gym.create_dataset(task, size=3, seed=0)]
  for question, answer in zip(verified.questions_of([task], 3, 0), answers, strict=True):
    assert max(map(question.score, verified.answers_in(reply.format(answer)))) == 1


@pytest.mark.parametrize("task", ["prime_factorization", "boxnet", "game_of_life"])
def test_what_a_verifier_cannot_read_is_wrong(task):
  [question] = verified.questions_of([task], 1, 3)
  assert max(map(question.score, ["", "abc", "{}", '{"a": 1}', "0.0", "1e400"])) < 1


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
    self.answers, self.wrong, self.seeds = questions, wrong, []

  def prompt_ids(self, text):
    return text

  def sampling(self, **settings):
    return SimpleNamespace(**settings)

  def generate(self, prompts, sampling):
    import reasoning_gym

    self.seeds += [one.seed for one in sampling]

    entries = {e["question"]: e["answer"] for e in reasoning_gym.create_dataset("chain_sum", size=12, seed=3)}

    def reply(prompt):
      question = prompt.split("\n\n" + verified.INSTRUCTION)[0]
      return "Answer: " + ("none" if prompt in self.wrong else entries[question])

    return [SimpleNamespace(prompt_index=i, text=reply(p)) for i, p in enumerate(prompts) for _ in range(sampling[i].n)]


def test_right_answers_are_right():
  questions = verified.questions_of(["chain_sum"], 12, 3)
  assert [q.text for q in questions] == [q.text for q in verified.questions_of(["chain_sum"], 12, 3)]
  wrong = [f"{questions[5].text}\n\n{verified.INSTRUCTION}\n"]
  scores = verified.scores_of(Knows(questions, wrong), questions, samples=2, batch_size=5)
  assert scores.shape == (12, 2) and (scores[5] == 0).all() and scores.sum() == 22


def test_questions_draw_by_seeds_of_their_own_in_any_batch():
  """One seed for all would give prompts of one length the same noise, and a batch's first the same as the next's."""
  questions = verified.questions_of(["chain_sum"], 12, 3)
  seeds = []
  for batch_size in (5, 12):
    model = Knows(questions)
    verified.scores_of(model, questions, samples=2, batch_size=batch_size, temperature=1.0, seed=2**64 - 3)
    seeds.append(model.seeds)
  assert seeds[0] == seeds[1] and len(set(seeds[0])) == 12 and max(seeds[0]) < 2**64


def test_unknown_task():
  with pytest.raises(ConfigError, match="no task 'sums'; it has "):
    verified.questions_of(["sums"], 1, 0)
  with pytest.raises(ConfigError, match="cannot make 1 questions of 'composite': "):
    verified.questions_of(["composite"], 1, 0)
  assert len(verified.questions_of(["gcd", " gcd"], 2, 0)) == 2
  with pytest.raises(ConfigError, match="batch size is 0"):
    verified.scores_of(Knows([]), [], batch_size=0)

"""Accuracy on tasks whose answers a program checks: reasoning-gym's seeded questions and verifiers.

A verifier gives 0 to 1 for an answer; accuracy is the mean. Greedy, each question is answered once; sampled, several
times, and the interval is over questions, because the answers to one of them are not independent.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxllm.base.errors import ConfigError
from jaxllm.inference.model import Model

Z95 = 1.959964  # of a normal distribution, 95% lie within so many standard deviations
INSTRUCTION = "Think if you need to. End with a line 'Answer: ' and the answer alone."


@dataclasses.dataclass(frozen=True)
class Question:
  task: str
  text: str
  score: Callable[[str], float]  # of an answer, 0 to 1


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """A mean of scores with a 95% interval."""

  mean: float
  low: float
  high: float
  questions: int
  solved: float  # share of the questions that were solved at least once


def questions_of(tasks: Sequence[str], count: int, seed: int) -> list[Question]:
  """`count` questions of each task of reasoning-gym, the same for the same seed.

  Raises:
    ConfigError: reasoning-gym is not installed, or has no such task.
  """
  try:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
  except ImportError:
    raise ConfigError("tasks with checked answers need reasoning-gym; pip install 'jaxllm[tasks]'") from None
  found = []
  for task in dict.fromkeys(name.strip() for name in tasks):
    if task not in DATASETS:
      raise ConfigError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    try:
      dataset = reasoning_gym.create_dataset(task, size=count, seed=seed)
    except (AssertionError, ValueError) as error:
      raise ConfigError(f"reasoning-gym cannot make {count} questions of {task!r}: {error}") from error
    for entry in dataset:
      found.append(Question(task, entry["question"], functools.partial(_score, dataset, entry)))
  return found


def _score(dataset: Any, entry: dict[str, Any], answer: str) -> float:
  try:
    return float(dataset.score_answer(answer, entry=entry))
  except Exception:  # some verifiers fail at what they cannot read, each in its own way
    return 0.0


def answer_in(text: str) -> str:
  """What a reply gives as its answer: between the last <answer> tags, or after the last "Answer:", or all of it."""
  return answers_in(text)[0]


def answers_in(text: str) -> list[str]:
  """The ways to read a reply's answer: the line behind "Answer:" without marks and full stop, the line as it stands,
  and all that follows, for an answer may be a grid, and may end with a full stop."""
  if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
    return [tagged[-1].strip()]
  said = list(re.finditer(r"(?im)^[\s*_#]*answer[ \t*_]*:(\*\*|__)?", text))
  rest = text[said[-1].end() if said else 0 :].strip()
  line = rest.partition("\n")[0].strip() if said else rest
  bare = line.lstrip("*_ ").rstrip("*_. ") if said else rest
  return list(dict.fromkeys((bare, line, rest)))


def scores_of(
  model: Model, questions: Sequence[Question], *, samples: int = 1, batch_size: int = 16, **sampling
) -> Float[np.ndarray, "questions samples"]:
  """The score of every answer; a model with a chat template is asked in a chat.

  Args:
    samples: answers to each question.
    sampling: of `SamplingParams`, temperature 0 for the likeliest answer. `seed` is that of the first question; each
      draws by one of its own, whatever batch it is in.
  """
  if batch_size < 1:
    raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
  seed = sampling.pop("seed", None)
  chats = model.tokenizer is not None and "default" in model.tokenizer.chat_templates
  rows = []
  for start in range(0, len(questions), batch_size):
    asked = questions[start : start + batch_size]
    texts = [f"{question.text}\n\n{INSTRUCTION}" for question in asked]
    prompts = [
      model.chat_ids([{"role": "user", "content": text}]) if chats else model.prompt_ids(f"{text}\n") for text in texts
    ]
    seeds = [None if seed is None else (seed + n) % 2**64 for n in range(start, start + len(asked))]
    done = model.generate(prompts, [model.sampling(**sampling, n=samples, seed=own) for own in seeds])
    for i, question in enumerate(asked):
      replies = [completion.text for completion in done if completion.prompt_index == i]
      rows.append([max(map(question.score, answers_in(reply))) for reply in replies])
  return np.asarray(rows, np.float64)


def accuracy(scores: Float[np.ndarray, "questions samples"]) -> Accuracy:
  """The mean score and its interval, Wilson's (1927): of as many answers, right or wrong, as would spread like the
  questions' means (Franco et al. 2019), and of no fewer than the questions and no more than the answers: verifiers that
  give a wrong answer a little spread less than what a right one would add."""
  per_question = scores.mean(1)
  count, mean = len(per_question), float(per_question.mean())
  spread = float(per_question.var(ddof=1)) if count > 1 else 0.0
  n = min(max(count, count * mean * (1 - mean) / spread), scores.size) if spread > 1e-12 else count
  middle, width = mean + Z95**2 / (2 * n), Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
  low, high = ((middle + sign * width) / (1 + Z95**2 / n) for sign in (-1, 1))
  return Accuracy(mean, max(0.0, low), min(1.0, high), count, float((scores.max(1) >= 1).mean()))

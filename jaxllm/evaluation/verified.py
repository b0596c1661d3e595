"""Accuracy on tasks whose answers a program checks: reasoning-gym's seeded questions and verifiers.

A verifier gives 0 to 1 for an answer; accuracy is the mean. Greedy, each question is answered once; sampled, several
times, and the interval is over questions, because the answers to one of them are not independent.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

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
  for task in tasks:
    if task not in DATASETS:
      raise ConfigError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    dataset = reasoning_gym.create_dataset(task, size=count, seed=seed)
    for entry in dataset:
      score = lambda answer, dataset=dataset, entry=entry: float(dataset.score_answer(answer, entry=entry))  # noqa: E731
      found.append(Question(task, entry["question"], score))
  return found


def answer_in(text: str) -> str:
  """What a reply gives as its answer: between the last <answer> tags, or after the last "Answer:", or all of it."""
  if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
    return tagged[-1].strip()
  if said := re.findall(r"(?im)^[\s*_#]*answer[\s*_]*:[\s*_]*(.*?)[\s*_.]*$", text):
    return said[-1].strip()
  return text.strip()


def scores_of(
  model: Model, questions: Sequence[Question], *, samples: int = 1, batch_size: int = 16, **sampling
) -> Float[np.ndarray, "questions samples"]:
  """The score of every answer; a model with a chat template is asked in a chat.

  Args:
    samples: answers to each question. sampling: `SamplingParams`, temperature 0 for the likeliest answer.
  """
  chats = model.tokenizer is not None and "default" in model.tokenizer.chat_templates
  rows = []
  for start in range(0, len(questions), batch_size):
    asked = questions[start : start + batch_size]
    texts = [f"{question.text}\n\n{INSTRUCTION}" for question in asked]
    prompts = [
      model.chat_ids([{"role": "user", "content": text}]) if chats else model.prompt_ids(f"{text}\n") for text in texts
    ]
    done = model.generate(prompts, n=samples, **sampling)
    for i, question in enumerate(asked):
      replies = [completion.text for completion in done if completion.prompt_index == i]
      rows.append([question.score(answer_in(reply)) for reply in replies])
  return np.asarray(rows, np.float64)


def accuracy(scores: Float[np.ndarray, "questions samples"]) -> Accuracy:
  """The mean score and its interval: Wilson's (1927) where every answer is right or wrong and was given once, else the
  normal one over the questions' means."""
  per_question = scores.mean(1)
  n, mean = len(per_question), float(per_question.mean())
  if scores.shape[1] == 1 and np.isin(scores, (0, 1)).all():
    middle, width = mean + Z95**2 / (2 * n), Z95 * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n**2))
    low, high = ((middle + sign * width) / (1 + Z95**2 / n) for sign in (-1, 1))
  else:
    width = Z95 * float(per_question.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    low, high = max(0.0, mean - width), min(1.0, mean + width)
  return Accuracy(mean, low, high, n, float((scores.max(1) >= 1).mean()))

"""Beam search: of each prompt the `num_beams` likeliest beginnings are continued, all at once; a client of the engine.

The rules, and so the results, are those of transformers' `generate(num_beams=k)`: a completion's score is its
log-probability / length ** length_penalty; one that ends among a step's k best continuations is kept, and the
search of a prompt is over when it has k completions and, depending on `early_stopping`, no better one is
expected. A beam's next step is a request of its own, for one token, whose beginning the engine finds in its pages.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from jaxllm.base.errors import DataError
from jaxllm.inference.completions import Completion
from jaxllm.inference.engine import Delta, Engine, Request
from jaxllm.inference.params import SamplingParams, with_word_ids
from jaxllm.inference.prompts import longest_text, room_for
from jaxllm.inference.text import Decodes, TextStream
from jaxllm.models.config import ModelConfig


def continuations(settings: SamplingParams, eos_ids: Sequence[int]) -> int:
  """How many of a step's best continuations a search looks at: even if they begin with all ends, so many hold
  `num_beams` others."""
  ends = len(_ends(settings, eos_ids))
  return settings.num_beams * max(2, 1 + ends)


def search(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  sampling: Sequence[SamplingParams],
  tokenizer: Decodes | None,
  eos_ids: Sequence[int],
) -> Iterator[Completion]:
  """The `n` best completions of every prompt, best first, once all are found.

  Args:
    engine: one whose log-probabilities are those after the settings' rules (`processed_logprobs`), as many as
      `continuations`; without `overlap`.

  Raises:
    DataError: logits are not finite.
  """
  each = zip(prompts, sampling, strict=True)
  searches = [_Search(prompt, settings, engine.config, tokenizer, eos_ids) for prompt, settings in each]
  while not all(one.done for one in searches):
    asked = {engine.submit(request): (one, i) for one in searches for i, request in enumerate(one.requests())}
    try:
      for number, delta in _answers(engine, asked):
        one, beam = asked[number]
        one.note(beam, delta)
    finally:
      for number in asked:
        engine.abort(number)
    for one in searches:
      one.choose()
  for index, one in enumerate(searches):
    yield from one.completions(index, tokenizer)


def _answers(engine: Engine, numbers) -> Iterator[tuple[int, Delta]]:
  """The first token of each of these requests, which then end."""
  left = set(numbers)
  while left:
    for delta in engine.step():
      if delta.id in left and (delta.token_ids or delta.finish_reason):
        if delta.error is not None:
          raise DataError(delta.error)
        left.remove(delta.id)
        engine.abort(delta.id)
        yield delta.id, delta


def _ends(settings: SamplingParams, eos_ids: Sequence[int]) -> set[int]:
  return {*(() if settings.ignore_eos else eos_ids), *settings.stop_token_ids}


class _Search:
  """One prompt's beams."""

  def __init__(self, prompt, settings: SamplingParams, config: ModelConfig, tokenizer: Decodes | None, eos_ids):
    settings = with_word_ids(settings, tokenizer)
    self.settings, self._prompt, self._eos_ids = settings, tuple(prompt), tuple(eos_ids)
    self._decoder = config.architecture == "decoder"
    begins = len(prompt) if self._decoder else 1
    self._limit = room_for(settings, range(begins), longest_text(config))
    self._ends = _ends(settings, eos_ids)
    self.done = False
    self._keep = min(continuations(settings, eos_ids), config.vocab_size)
    self._beams: list[tuple[np.float32, tuple[int, ...]]] = [(np.float32(0), ())]  # scores and tokens, best first
    self._found: list[tuple[np.float32, int, int]] = []  # continuations: score, beam, token
    self._finished: list[tuple[float, tuple[int, ...]]] = []  # scores and tokens, best first

  def requests(self) -> list[Request]:
    """For each running beam the likeliest tokens behind it."""
    if self.done:
      return []
    own = dataclasses.replace(self.settings, num_beams=1, n=1, temperature=0, logprobs=self._keep)
    return [Request(self._prompt, own, self._eos_ids, generated=tokens) for _, tokens in self._beams]

  def note(self, beam: int, delta: Delta) -> None:
    """The likeliest tokens behind a beam."""
    assert delta.logprobs is not None
    score = self._beams[beam][0]
    for token, shown in delta.logprobs[0].items():
      self._found.append((score + np.float32(shown.logprob), beam, token))

  def choose(self) -> None:
    """Chooses the next beams from the best continuations; sets `done` when there is no need to."""
    if self.done:
      return
    s, length = self.settings, len(self._beams[0][1]) + 1
    best = sorted(self._found, key=lambda one: (-one[0], one[1:]))[: self._keep]
    texts = [(score, (*self._beams[beam][1], token)) for score, beam, token in best if np.isfinite(score)]
    self._found, last = [], length >= self._limit
    ended = [last or text[-1] in self._ends for _, text in texts]
    new = [(float(score) / length**s.length_penalty, text) for score, text in _where(texts, ended, s.num_beams)]
    self._finished = sorted(self._finished + new, key=lambda one: -one[0])[: s.num_beams]
    going = [one for one, over in zip(texts, ended) if not over][: s.num_beams]
    if not going:
      self.done = True
      return
    self._beams = going
    if len(self._finished) == s.num_beams:
      longest = self._limit if s.early_stopping == "never" and s.length_penalty > 0 else length
      hope = float(going[0][0]) / longest**s.length_penalty
      self.done = s.early_stopping is True or hope <= self._finished[-1][0]

  def completions(self, prompt_index: int, tokenizer: Decodes | None) -> Iterator[Completion]:
    """The `n` best, best first."""
    for index, (score, tokens) in enumerate(self._finished[: self.settings.n]):
      end = tokens[-1] if tokens[-1] in self._ends else None
      text = ""
      if tokenizer is not None:
        stream = TextStream(tokenizer, self._prompt if self._decoder else ())
        text = "".join(map(stream.push, tokens if end is None else tokens[:-1])) + stream.finish()
      yield Completion(
        prompt_index=prompt_index,
        index=index,
        text=text,
        token_ids=tokens,
        finish_reason="length" if end is None else "stop",
        stop_reason=None if end in self._eos_ids and not self.settings.ignore_eos else end,
        prompt_tokens=len(self._prompt),
        score=score,
      )


def _where(items, holds, most: int) -> list:
  return [one for one, good in zip(items[:most], holds) if good]

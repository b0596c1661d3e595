"""Prompts in, text out: the engine's client that has a tokenizer. Everything that writes text goes through it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxllm.base.errors import ConfigError
from jaxllm.inference.completions import Completion, Delta, Logprob, RequestMetrics, RequestOutput
from jaxllm.inference.engine import Delta as Gain
from jaxllm.inference.engine import Engine, Request
from jaxllm.inference.engine.replicas import Replicas
from jaxllm.inference.guided import Guide, PieceText
from jaxllm.inference.params import SamplingParams, with_word_ids
from jaxllm.inference.prompts import token_ids
from jaxllm.inference.text import SpecialText
from jaxllm.inference.writer import Writer, likeliest, named


@dataclasses.dataclass
class _Asked:
  """A prompt with its completions on their way."""

  text: str | None
  prompt: tuple[int, ...]
  settings: SamplingParams
  writers: dict[int, Writer] = dataclasses.field(default_factory=dict)  # by the engine's numbers
  prompt_logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
  metrics: list[RequestMetrics] = dataclasses.field(default_factory=list)
  cached: int = 0

  @property
  def finished(self) -> bool:
    return all(writer.reason is not None for writer in self.writers.values())


class Requests:
  """Completes prompts with an engine; each prompt's `n` or `best_of` completions are requests of it.

  Args:
    tokenizer: for text; None: there is none, and settings that need one are refused.
    eos_ids: tokens that end a completion unless `ignore_eos`.
  """

  def __init__(self, engine: Engine | Replicas, tokenizer: Any = None, eos_ids: Sequence[int] = ()):
    self.engine, self._tokenizer, self._eos_ids = engine, tokenizer, tuple(eos_ids)
    self._asked: dict[int, _Asked] = {}
    self._of: dict[int, int] = {}  # the engine's numbers to ours
    self._count = 0
    self._early: list[Gain] = []  # the last ones of requests that were aborted

  @property
  def busy(self) -> bool:
    """Whether `step` has anything left to do."""
    return bool(self._of)

  def submit(
    self,
    prompt: Sequence[int],
    settings: SamplingParams,
    *,
    eos_ids: Sequence[int] | None = None,
    text: str | None = None,
    priority: int = 0,
    salt: str = "",
    adapter: str | None = None,
  ) -> int:
    """Takes a prompt in; its number, which its deltas bear as `prompt_index`. See `Request` for the others.

    Args:
      eos_ids: in place of the usual ones. text: of the prompt, for its answer.

    Raises:
      ConfigError: it can never be served, and why; nothing of it is left then.
    """
    prompt, tokenizer = tuple(token_ids(prompt, "the prompt")), self._tokenizer
    if settings.stop and tokenizer is None:
      raise ConfigError("stop strings need a tokenizer; use stop_token_ids")
    settings = with_word_ids(settings, tokenizer)
    asked, number, decoder = _Asked(text, prompt, settings), self._count, self.engine.config.architecture == "decoder"
    eos_ids = self._eos_ids if eos_ids is None else tuple(eos_ids)
    eos = frozenset(() if settings.ignore_eos else eos_ids)
    reads = tokenizer
    if settings.structured_outputs is None and tokenizer is not None and not settings.skip_special_tokens:
      reads = SpecialText(tokenizer)
    try:
      for index in range(settings.draws):
        guide = None
        if settings.structured_outputs is not None:
          guide = Guide(settings.structured_outputs, tokenizer, self.engine.config.vocab_size, eos)
          reads = PieceText(tokenizer)
        own = dataclasses.replace(
          settings,
          logprobs=0 if settings.draws > settings.n and settings.logprobs is None else settings.logprobs,
          prompt_logprobs=settings.prompt_logprobs if index == 0 else None,
        )
        more = dict(priority=priority, salt=salt, guide=guide, adapter=adapter)
        request = Request(prompt, own, eos_ids, index, **more)
        one = self.engine.submit(request)  # which refuses tokens that the tokenizer has not either
        asked.writers[one] = Writer(
          number,
          index,
          prompt,
          settings,
          ends=eos | set(settings.stop_token_ids),
          begins=len(prompt) if decoder else 1,
          reads=reads,
          names=tokenizer,
          context=prompt if decoder else (),
        )
    except BaseException:
      for one in asked.writers:
        self.engine.abort(one)
      raise
    self._asked[number] = asked
    self._of |= dict.fromkeys(asked.writers, number)
    self._count += 1
    return number

  def abort(self, number: int) -> None:
    """Ends a prompt's completions; one that is over, or never was, is left alone."""
    if number in self._asked:
      for one, writer in self._asked[number].writers.items():
        if writer.reason is None and (last := self.engine.abort(one)) is not None:
          self._early.append(last)

  def completions(self, number: int) -> int:
    """How many completions a prompt's answer has."""
    return self._asked[number].settings.n

  def forget(self, number: int) -> None:
    """Ends a prompt's completions, and nobody asks for its answer."""
    self.abort(number)
    asked = self._asked.pop(number, None)
    for one in () if asked is None else asked.writers:
      self._of.pop(one, None)

  def step(self) -> list[Delta]:
    """What every completion gains by one step of the engine. With `best_of` nothing, until all are whole."""
    early, self._early = self._early, []
    return [delta for gain in [*early, *(self.engine.step() if self.engine.busy else ())] for delta in self._take(gain)]

  def output(self, number: int) -> RequestOutput:
    """The answer to a prompt, or as much of it as there is; one that is finished is handed out once."""
    asked = self._asked[number]
    shown = None
    if asked.settings.prompt_logprobs is not None:
      shown = (None, *asked.prompt_logprobs)
    outputs = self._best(asked) if asked.finished else [one.completion() for one in asked.writers.values()]
    if asked.finished:
      del self._asked[number]
    return RequestOutput(
      request_id=str(number),
      prompt=asked.text,
      prompt_token_ids=asked.prompt,
      outputs=tuple(one.output() for one in outputs),
      finished=asked.finished,
      prompt_logprobs=shown,
      metrics=_together(asked.metrics) if asked.metrics else None,
      num_cached_tokens=asked.cached,
    )

  def _take(self, gain: Gain) -> list[Delta]:
    if gain.id not in self._of:
      return []
    number = self._of[gain.id]
    asked = self._asked[number]
    writer = asked.writers[gain.id]
    asked.prompt_logprobs += [named(one, self._tokenizer) for one in gain.prompt_logprobs or ()]
    text, tokens = writer.take(gain)
    if writer.reason is not None:
      del self._of[gain.id]
      gain = self.engine.abort(gain.id) or gain  # a stop string has ended what the engine would go on with
    if gain.metrics is not None:
      asked.metrics.append(gain.metrics)
      asked.cached = max(asked.cached, gain.cached_tokens)
    if asked.settings.draws > asked.settings.n:
      best = self._best(asked) if asked.finished else []
      return [Delta(number, one.index, one.text, one.token_ids, one) for one in best]
    done = writer.completion() if writer.reason is not None else None
    return [Delta(number, writer.index, text, tokens, done)] if tokens or text or done else []

  def _best(self, asked: _Asked) -> list[Completion]:
    found = [writer.completion() for writer in asked.writers.values()]
    return likeliest(found, asked.settings.n) if asked.settings.draws > asked.settings.n else found


def _together(metrics: Sequence[RequestMetrics]) -> RequestMetrics:
  """Of all completions of a prompt: the first start, the last end, all steps."""

  def first(name):
    return min((t for one in metrics if (t := getattr(one, name)) is not None), default=None)

  return RequestMetrics(
    arrival_time=first("arrival_time"),
    first_scheduled_time=first("first_scheduled_time"),
    first_token_time=first("first_token_time"),
    finished_time=max(one.finished_time or 0.0 for one in metrics),
    target_steps=sum(one.target_steps for one in metrics),
  )

"""One completion in the making: the text of its tokens, and where a stop string ends it."""

import dataclasses
from collections.abc import Sequence

from jaxllm.inference.completions import Completion, Logprob
from jaxllm.inference.engine import Delta
from jaxllm.inference.params import SamplingParams
from jaxllm.inference.text import Decodes, TextStream


class Writer:
  """Takes what the engine says of one completion.

  Attributes:
    reason: why it is finished; None: it is not.
  """

  def __init__(
    self,
    request: int,
    index: int,
    prompt: Sequence[int],
    settings: SamplingParams,
    *,
    ends: frozenset[int],
    begins: int,
    reads: Decodes | None,
    names: Decodes | None,
    context: Sequence[int],
  ):
    """
    Args:
      ends: tokens that end it, whose text is not the completion's. begins: tokens before its first one.
      reads: a tokenizer for its text. names: for the single tokens of log-probabilities.
      context: tokens before it that its text may depend on.
    """
    self.request, self.index, self.prompt, self.settings = request, index, prompt, settings
    self._ends, self._names = ends, names
    self._least = max(settings.min_tokens, settings.min_length - begins)
    self._text = reads and TextStream(reads, context, settings.stop, settings.include_stop_str_in_output)
    self._parts: list[str] = []
    self._tokens: list[int] = []
    self._logprobs: list[dict[int, Logprob]] = []
    self.reason: str | None = None
    self._stop: int | str | None = None
    self._error: str | None = None

  def take(self, delta: Delta) -> tuple[str, tuple[int, ...]]:
    """The text and the tokens that the completion gains; sets `reason` when it is finished, by a stop string perhaps
    before the delta is over."""
    text, first = "", len(self._tokens)
    for i, token in enumerate(delta.token_ids):
      self._tokens.append(token)
      if delta.logprobs is not None:
        self._logprobs.append(named(delta.logprobs[i], self._names))
      if self._text is None or token in self._ends and not self.settings.include_stop_str_in_output:
        continue
      text += self._text.push(token, may_stop=len(self._tokens) > self._least)
      if self._text.stopped is not None:
        break
    ended = self._text is not None and self._text.stopped is not None
    if not ended and delta.finish_reason is not None:
      self.reason, self._stop, self._error = delta.finish_reason, delta.stop_reason, delta.error
      text += "" if self._text is None else self._text.finish()
    if self._text is not None and self._text.stopped is not None:
      self.reason, self._stop, self._error = "stop", self._text.stopped, None
    self._parts.append(text)
    return text, tuple(self._tokens[first:])

  def completion(self) -> Completion:
    """All of it, finished or on its way."""
    total = sum(float(shown[token]) for shown, token in zip(self._logprobs, self._tokens))
    return Completion(
      prompt_index=self.request,
      index=self.index,
      text="".join(self._parts),
      token_ids=tuple(self._tokens),
      finish_reason=self.reason,
      stop_reason=self._stop,
      error=self._error,
      prompt_tokens=len(self.prompt),
      logprobs=tuple(self._logprobs) if self.settings.logprobs is not None else None,
      cumulative_logprob=total if self._logprobs else None,
    )


def named(shown: dict[int, Logprob], names: Decodes | None) -> dict[int, Logprob]:
  """Log-probabilities with the texts of their tokens."""
  known = 0 if names is None else names.vocab_size
  return {i: Logprob(float(p), p.rank, names.decode([i]) if i < known else None) for i, p in shown.items()}


def likeliest(completions: Sequence[Completion], count: int) -> list[Completion]:
  """The `count` most likely ones, numbered anew."""
  order = sorted(completions, key=lambda one: (-(one.cumulative_logprob or 0.0), one.index))
  return [dataclasses.replace(one, index=index) for index, one in enumerate(order[:count])]

"""One completion in the making, on the host: what its tokens say, and where it ends."""

from collections.abc import Collection, Sequence
from typing import Literal

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.inference.completions import Completion, Logprob
from jaxllm.inference.guided import Guide, PieceText
from jaxllm.inference.params import SamplingParams, with_word_ids
from jaxllm.inference.prompts import room_for
from jaxllm.inference.text import Decodes, SpecialText, TextStream
from jaxllm.models.config import ModelConfig


class Row:
  """Takes the tokens of one completion as they are drawn.

  Attributes:
    settings: with bad words as token ids. begins: tokens before the completion, in the decoder.
    limit: tokens that there may be, those included. ends: tokens that end the completion.
    guide: follows `structured_outputs`. reason: why it is finished; None: it is not.
  """

  def __init__(
    self,
    prompt_index: int,
    index: int,
    prompt: Sequence[int],
    settings: SamplingParams,
    config: ModelConfig,
    tokenizer: Decodes | None,
    eos_ids: Collection[int],
  ):
    """Raises:
    ConfigError: a setting needs a tokenizer, the grammar is invalid, or there is no room for a token.
    """
    if settings.stop and tokenizer is None:
      raise ConfigError("stop strings need a tokenizer; use stop_token_ids")
    self.prompt_index, self.index, self.prompt = prompt_index, index, prompt
    self.settings = settings = with_word_ids(settings, tokenizer)
    self.begins = len(prompt) if config.architecture == "decoder" else 1
    self.limit = self.begins + room_for(settings, range(self.begins), config.max_seq_len)
    self._eos = frozenset(() if settings.ignore_eos else eos_ids)
    self.ends = self._eos | set(settings.stop_token_ids)
    self._least = max(settings.min_tokens, settings.min_length - self.begins)
    self.guide: Guide | None = None
    if settings.structured_outputs is not None:
      self.guide = Guide(settings.structured_outputs, tokenizer, config.vocab_size, self._eos)
      tokenizer = PieceText(tokenizer)
    elif tokenizer is not None and not settings.skip_special_tokens:
      tokenizer = SpecialText(tokenizer)
    context = prompt if config.architecture == "decoder" else ()
    self._text = tokenizer and TextStream(tokenizer, context, settings.stop, settings.include_stop_str_in_output)
    self._parts: list[str] = []
    self.tokens: list[int] = []
    self._logprobs: list[dict[int, Logprob]] = []
    self._sum = 0.0
    self.reason: Literal["stop", "length"] | None = None
    self._stop_reason: int | str | None = None

  def take(self, token: int, logprobs: dict[int, Logprob] | None = None) -> str:
    """The text that a token adds; sets `reason` when it is the last.

    Args:
      logprobs: of the token, and of the most likely ones.

    Raises:
      DataError: the token is -1, by which `SamplingRows.draw` says that there is none.
    """
    if token < 0:
      raise DataError(
        f"no token can be drawn at position {self.begins + len(self.tokens)} of prompt {self.prompt_index + 1}: its "
        "settings leave none over, or the model's logits are not finite"
      )
    self.tokens.append(token)
    if logprobs is not None:
      self._logprobs.append(logprobs)
      self._sum += logprobs[token]
    text = ""
    if token in self.ends:
      self.reason, self._stop_reason = "stop", None if token in self._eos else token
    elif self.guide is not None:
      self.guide.take(token)
      self.reason = "stop" if self.guide.finished else None
    if self._text is not None and (token not in self.ends or self.settings.include_stop_str_in_output):
      text = self._text.push(token, may_stop=len(self.tokens) > self._least)
    if self.reason is None and self.begins + len(self.tokens) >= self.limit:
      self.reason = "length"
    if self._text is not None:
      text += self._text.finish() if self.reason is not None else ""
      if self._text.stopped is not None:
        self.reason, self._stop_reason = "stop", self._text.stopped
    self._parts.append(text)
    return text

  def completion(self) -> Completion:
    """All of it."""
    assert self.reason is not None
    asked = self.settings.logprobs is not None
    return Completion(
      prompt_index=self.prompt_index,
      index=self.index,
      text="".join(self._parts),
      token_ids=tuple(self.tokens),
      finish_reason=self.reason,
      stop_reason=self._stop_reason,
      prompt_tokens=len(self.prompt),
      logprobs=tuple(self._logprobs) if asked else None,
      cumulative_logprob=self._sum if self._logprobs else None,
    )

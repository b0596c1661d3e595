"""What a prompt may be, and how much room it leaves."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxllm.base.errors import ConfigError
from jaxllm.inference.params import SamplingParams
from jaxllm.models.config import ModelConfig

SMALLEST_BUCKET = 16  # tokens; prompts and caches are padded to this times a power of two


def pad_rows(
  rows: Sequence[Sequence[int]], config: ModelConfig
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
  """Right-padded token ids, and the rows' lengths."""
  tokens = np.zeros((len(rows), bucket(max(map(len, rows)), config)), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  return tokens, np.asarray([len(row) for row in rows], np.int32)


def token_ids(tokens: Any, what: str) -> list[int]:
  """The tokens as whole numbers.

  Raises:
    ConfigError: they are none.
  """
  if isinstance(tokens, str | bytes | Mapping) or not isinstance(tokens, Iterable):
    raise ConfigError(f"{what} is {_short(tokens)}; it must be a list of token ids")
  ids = tokens.tolist() if isinstance(tokens, np.ndarray) else [getattr(i, "item", lambda i=i: i)() for i in tokens]
  for token in ids:
    if not isinstance(token, int) or isinstance(token, bool):
      raise ConfigError(f"{what} holds {_short(token)}, which is no token id")
  return ids


def check_text(text: Any, what: str) -> str:
  """The text, if it is one that can be read.

  Raises:
    ConfigError: it is no text, or holds half a character, as files of other encodings leave behind.
  """
  if not isinstance(text, str):
    raise ConfigError(f"{what} is {_short(text)}; it must be text")
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(f"{what} holds {text[error.start]!a} at character {error.start}: half of a character") from None
  return text


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 40 else f"{text[:37]}..."


def longest_text(config: ModelConfig) -> int:
  """The most tokens that the model reads, `sys.maxsize` where there is no limit."""
  return config.max_seq_len if config.has_length_limit else sys.maxsize


def check_prompt(prompt: list[int], name: str, config: ModelConfig) -> None:
  """That the model can read it.

  Raises:
    ConfigError: it cannot; the message says why.
  """
  if not prompt:
    raise ConfigError(f"{name} is empty; a completion needs at least one token before it")
  if config.architecture != "decoder" and len(prompt) > longest_text(config):
    raise ConfigError(
      f"{name} has {len(prompt)} tokens: its sequence length is over the model's limit of {config.max_seq_len} "
      "(model.max_seq_len); shorten it"
    )
  if config.architecture == "decoder" and len(prompt) >= longest_text(config):
    raise ConfigError(
      f"{name} has {len(prompt)} tokens: with one more, its sequence length is over the model's limit of "
      f"{config.max_seq_len} (model.max_seq_len); shorten it"
    )
  if min(prompt) < 0 or max(prompt) >= config.vocab_size:
    bad = next(token for token in prompt if not 0 <= token < config.vocab_size)
    raise ConfigError(f"{name} holds token {bad}, but the model's vocabulary has {config.vocab_size} tokens")


def with_an_end(settings: SamplingParams, config: ModelConfig) -> SamplingParams:
  """The settings; where they do not say how long a text gets, it is over at max_seq_len tokens."""
  given = settings.max_tokens is not None or settings.max_length is not None
  return settings if given else dataclasses.replace(settings, max_length=config.max_seq_len)


def room_for(settings: SamplingParams, first: Sequence[int], longest: int) -> int:
  """How many tokens may follow the `first` ones of a decoder's row that holds at most `longest`.

  Raises:
    ConfigError: `max_length` leaves no room for one.
  """
  room = longest - len(first)
  if settings.max_length is not None:
    room = min(room, settings.max_length - len(first))
  if room < 1:
    told = f"the prompt has {len(first)} tokens and max_length is {settings.max_length}"
    raise ConfigError(f"{told}; raise it or give max_tokens")
  return min(room, settings.max_tokens or room)


def bucket(length: int, config: ModelConfig) -> int:
  """A length that few compilations share: no less than `length`, nor more than max_seq_len if that is enough."""
  size = SMALLEST_BUCKET
  while size < length:
    size *= 2
  return size if length > config.max_seq_len else min(size, config.max_seq_len)

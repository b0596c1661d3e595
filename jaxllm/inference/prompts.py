"""Prompts as arrays, and the model's reading of them, which every way of decoding begins with."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.base.errors import ConfigError
from jaxllm.inference.params import SamplingParams
from jaxllm.models.caches import KVCache, init_cache
from jaxllm.models.config import ModelConfig
from jaxllm.models.transformer import Transformer

SMALLEST_BUCKET = 16  # tokens; prompts and caches are padded to this times a power of two


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
  """Right-padded prompts; those of an encoder_decoder are its encoder's `source`, with mask, and the
  decoder begins with its start token."""

  tokens: Int[Array, "B P"]
  lengths: Int[Array, " B"]
  source: Int[Array, "B S"] | None = None
  source_mask: Int[Array, "B S"] | None = None


def batch_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig) -> Prompts:
  """Prompts as arrays, padded to lengths that few compilations share."""
  tokens, lengths = pad_rows(prompts, config)
  if config.architecture != "encoder_decoder":
    return Prompts(tokens, lengths)
  starts, ones = pad_rows([[config.decoder_start_id]] * len(prompts), config)
  return Prompts(starts, ones, tokens, (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32))


def pad_rows(
  rows: Sequence[Sequence[int]], config: ModelConfig
) -> tuple[Int[np.ndarray, "B P"], Int[np.ndarray, " B"]]:
  """Right-padded token ids, and the rows' lengths."""
  tokens = np.zeros((len(rows), bucket(max(map(len, rows)), config)), np.int32)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  return tokens, np.asarray([len(row) for row in rows], np.int32)


def read_prompts(model: Transformer, prompts: Prompts, cache_length: int) -> tuple[Float[Array, "B V"], KVCache]:
  """The logits after each prompt, and a cache of `cache_length` slots that holds the prompts."""
  batch, padded = prompts.tokens.shape
  encoded = None if prompts.source is None else model.encode(prompts.source, segment_ids=prompts.source_mask)
  cache = init_cache(model.config, batch, padded, model.compute.dtype).expecting(prompts.lengths)
  x, filled = model.hidden(prompts.tokens, cache=cache, encoded=encoded, encoded_segment_ids=prompts.source_mask)
  assert filled is not None
  last = jnp.take_along_axis(x, (prompts.lengths - 1)[:, None, None], axis=1)
  return model.logits(last)[:, 0], filled.grow(cache_length)


def check_prompt(prompt: list[int], name: str, config: ModelConfig) -> None:
  """That the model can read it.

  Raises:
    ConfigError: it cannot; the message says why.
  """
  if not prompt:
    raise ConfigError(f"{name} is empty; a completion needs at least one token before it")
  if config.architecture != "decoder" and len(prompt) > config.max_seq_len:
    raise ConfigError(
      f"{name} has {len(prompt)} tokens: its sequence length is over the model's limit of {config.max_seq_len} "
      "(model.max_seq_len); shorten it"
    )
  if config.architecture == "decoder" and len(prompt) >= config.max_seq_len:
    raise ConfigError(
      f"{name} has {len(prompt)} tokens: with one more, its sequence length is over the model's limit of "
      f"{config.max_seq_len} (model.max_seq_len); shorten it"
    )
  if min(prompt) < 0 or max(prompt) >= config.vocab_size:
    bad = next(token for token in prompt if not 0 <= token < config.vocab_size)
    raise ConfigError(f"{name} holds token {bad}, but the model's vocabulary has {config.vocab_size} tokens")


def room_for(settings: SamplingParams, first: Sequence[int], longest: int) -> int:
  """How many tokens may follow the `first` ones of a decoder's row that holds at most `longest`.

  Raises:
    ConfigError: `max_length` leaves no room for one.
  """
  room = longest - len(first)
  if settings.max_length is not None:
    room = min(room, settings.max_length - len(first))
  if room < 1:
    raise ConfigError(f"the prompt has {len(first)} tokens and max_length is {settings.max_length}; raise it")
  return min(room, settings.max_tokens or room)


def bucket(length: int, config: ModelConfig) -> int:
  """A length that few compilations share: no less than `length`, no more than the model's limit."""
  size = SMALLEST_BUCKET
  while size < length:
    size *= 2
  return min(size, config.max_seq_len)

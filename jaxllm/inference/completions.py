"""What generation gives back: whole completions, and their parts as they come."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Completion:
  """One finished completion. `token_ids` includes the token that ended it, `text` does not."""

  prompt_index: int  # which prompt it continues
  index: int  # which of that prompt's `n` completions
  text: str  # "" without a tokenizer
  token_ids: tuple[int, ...]
  finish_reason: Literal["stop", "length"]
  stop_reason: int | str | None  # the token id or string that stopped it; None for the end-of-text token
  prompt_tokens: int
  # For each token: log-probabilities, at temperature 1, of itself and of the most likely tokens.
  logprobs: tuple[dict[int, float], ...] | None = None
  score: float | None = None  # beam search: log-probability / length ** length_penalty


@dataclasses.dataclass(frozen=True)
class Delta:
  """What one row gained: tokens, and the text that they completed."""

  prompt_index: int
  index: int
  text: str
  token_ids: tuple[int, ...]
  completion: Completion | None = None  # with the row's last delta

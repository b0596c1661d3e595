"""Guided output: which tokens may come next so that a text is what a schema, a regular expression, a choice or a
grammar admits. `llguidance` follows the grammar on the host; the device gets a packed set of tokens a step."""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from jaxllm.base.errors import ConfigError
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.inference.logits import EVERYTHING, pack, words_for
from jaxllm.inference.params import StructuredOutputsParams

STUCK = "NoExtensionBias"  # what `llguidance` calls a text that no token continues


class Guide:
  """Follows the text of one completion.

  Its text is what the tokenizer's pieces are, joined (see `PieceText`): nothing is added or dropped at its start or
  around a word. A token that ends a completion is allowed only where the text may end.

  Attributes:
    allowed: the tokens that may come next, packed as `jaxllm.inference.logits.pack` does.
    finished: the text is whole, and nothing but an end can follow.
  """

  allowed: UInt32[np.ndarray, " W"]
  finished: bool

  def __init__(
    self, wanted: StructuredOutputsParams, tokenizer: Tokenizer | None, vocab_size: int, ends: Iterable[int]
  ):
    """`vocab_size` is the model's; `ends` are the tokens that end a completion, and may be none.

    Raises:
      ConfigError: there is no tokenizer, the schema or grammar is invalid or not supported, the tokenizer cannot
        write any text of it, or `llguidance` is not installed.
    """
    if tokenizer is None:
      raise ConfigError("structured_outputs need a tokenizer")
    self._ends, self._vocab_size = frozenset(ends), vocab_size
    vocabulary = _vocabulary(tokenizer, vocab_size, self._ends)
    self._matcher = _matcher(_grammar(wanted), vocabulary).deep_copy()
    self._text = ~pack(self._ends, vocab_size)
    self._look()

  def take(self, token: int) -> None:
    """Goes on behind a token that was drawn.

    Raises:
      ConfigError: the grammar does not admit it, or has become too complex to follow.
    """
    if not self._matcher.consume_token(token):
      raise _refusal(self._matcher.get_error())
    self._look()

  def allowed_after(self, drafts: Sequence[int]) -> UInt32[np.ndarray, "K W"]:
    """What may come next, and what behind each of some drafted tokens. Behind one that is not admitted, and so will
    not be drawn, everything may."""
    masks = np.full((len(drafts) + 1, len(self.allowed)), EVERYTHING)
    masks[0], taken = self.allowed, 0
    for draft in drafts:
      if self._matcher.try_consume_tokens([draft]) == 0:
        break
      taken += 1
      masks[taken] = self._mask()
    self._matcher.rollback(taken)
    return masks

  def _look(self) -> None:
    self.allowed = self._mask()
    if self._matcher.is_error():
      raise _refusal(self._matcher.get_error())
    self.finished = not np.any(self.allowed & self._text)
    if self.finished and not self._matcher.is_accepting():
      raise _refusal(STUCK)

  def _mask(self) -> UInt32[np.ndarray, " W"]:
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    mask = allocate_token_bitmask(1, self._vocab_size + 1)  # one more than the model has: see `_vocabulary`
    fill_next_token_bitmask(self._matcher, mask)
    words = mask[0].view(np.uint32)[: words_for(self._vocab_size)]
    words[-1] &= EVERYTHING >> np.uint32(-self._vocab_size % 32)
    return words


class PieceText:
  """The texts of tokens as a `Guide` reads them: their pieces, joined."""

  def __init__(self, tokenizer: Tokenizer):
    self.vocab_size, self._pieces = tokenizer.vocab_size, tokenizer.pieces()

  tidies = False

  def decode(self, ids: Iterable[int], tidy: bool = True) -> str:
    """The text of some ids; special tokens have none."""
    return b"".join([self._pieces[i] for i in ids]).decode("utf-8", "replace")


class _Vocabulary:
  """A tokenizer as `llguidance` wants it."""

  bos_token_id = None

  def __init__(self, tokenizer: Tokenizer, vocab_size: int):
    self._tokenizer = tokenizer
    self.eos_token_id = vocab_size
    self.tokens = [*tokenizer.pieces(), *[b""] * (vocab_size + 1 - tokenizer.vocab_size)]
    for i in tokenizer.special_ids:  # by these names a grammar can ask for them
      self.tokens[i] = tokenizer.token_text(i).encode()
    self.tokens[vocab_size] = b"<no end>"
    self.special_token_ids = [*sorted(tokenizer.special_ids), vocab_size]
    self._ids = {piece: i for i, piece in enumerate(tokenizer.pieces()) if piece and i not in tokenizer.special_ids}
    self._longest = max(map(len, self._ids), default=0)

  def __call__(self, text: bytes) -> list[int]:
    """How a text would be written; it decides which token is taken where the grammar leaves no choice."""
    ids = [int(i) for i in self._tokenizer.encode(text)]
    if b"".join([self.tokens[i] for i in ids]) == text:
      return ids
    # The tokenizer sees the start of a text and puts a space there; this one stands in the middle.
    ids, place = [], 0
    while place < len(text):
      sizes = range(min(self._longest, len(text) - place), 0, -1)
      size = next((n for n in sizes if text[place : place + n] in self._ids), 0)
      if size == 0:
        break
      ids.append(self._ids[text[place : place + size]])
      place += size
    return ids


def _llguidance() -> Any:
  try:
    import llguidance
  except ImportError as error:
    raise ConfigError("structured_outputs need llguidance; install jaxllm[guided]") from error
  return llguidance


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: frozenset[int]) -> Any:
  """`llguidance` wants an end; where there is none it gets one behind the model's last token."""
  llguidance = _llguidance()
  wrapped = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
  return llguidance.LLTokenizer(wrapped, eos_token=sorted(ends) or [vocab_size])


@functools.lru_cache(maxsize=64)
def _matcher(grammar: str, vocabulary: Any) -> Any:
  """A matcher at the start of a text, to be copied."""
  matcher = _llguidance().LLMatcher(vocabulary, grammar, log_level=0)
  if matcher.is_error():
    raise _refusal(matcher.get_error())
  return matcher


def _grammar(wanted: StructuredOutputsParams) -> str:
  llguidance = _llguidance()
  matcher = llguidance.LLMatcher
  try:
    if wanted.regex is not None:
      return matcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
      return matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in wanted.choice))
    if wanted.grammar is not None:
      return llguidance.grammar_from("grammar", wanted.grammar)
    schema = {"type": "object"} if wanted.json_object else wanted.json
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": not wanted.disable_any_whitespace})
  except (ValueError, TypeError) as error:
    raise _refusal(str(error)) from error


def _refusal(message: str) -> ConfigError:
  """The first sentence of what `llguidance` says, which goes on with the parser's state."""
  if STUCK in message:
    return ConfigError("structured_outputs: the tokenizer has no token with which the text could go on")
  return ConfigError("structured_outputs: " + " ".join(message.partition("<state>")[0].split()))

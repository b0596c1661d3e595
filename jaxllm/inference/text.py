"""Tokens to text while they arrive: whole characters only, and nothing of a stop string."""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from jaxllm.data.tokenizers import Tokenizer
from jaxllm.data.tokenizers.base import tidied

UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet
# Where nothing of a text that is `tidied` depends on what stands on the other side: " ' " may leave "n't" or "'m".
_PARTS = re.compile("(?<![ '])(?<! n)(?= )")
CONTEXT = 8  # prompt tokens that the first decoded token sees before it


class Decodes(Protocol):
  """The part of `jaxllm.data.tokenizers.Tokenizer` that this file needs."""

  vocab_size: int

  @property
  def tidies(self) -> bool:
    """Whether texts are `tidied`."""

  def decode(self, ids: Iterable[int], tidy: bool = True) -> str:
    """The text of some ids; `tidy`: `tidied` where the vocabulary `tidies`."""


class SpecialText:
  """The texts of tokens with the special ones in them, as the vocabulary spells them."""

  def __init__(self, tokenizer: Tokenizer):
    self.vocab_size, self.tidies, self._tokenizer = tokenizer.vocab_size, tokenizer.tidies, tokenizer

  def decode(self, ids: Iterable[int], tidy: bool = True) -> str:
    """The text of some ids."""
    special = lambda i: i in self._tokenizer.special_ids  # noqa: E731
    runs = ((one, list(run)) for one, run in itertools.groupby(ids, special))
    spelled = (
      map(self._tokenizer.token_text, run) if one else [self._tokenizer.decode(run, False)] for one, run in runs
    )
    text = "".join(itertools.chain.from_iterable(spelled))
    return tidied(text) if tidy and self.tidies else text


class TextStream:
  """The text of one completion, handed out as its tokens arrive.

  All that was handed out, joined, is the text of the whole completion up to the first stop string.
  """

  def __init__(self, tokenizer: Decodes, prompt: Sequence[int], stop: Sequence[str] = (), include_stop: bool = False):
    """`include_stop`: the text ends behind the stop string rather than before it."""
    self._tokenizer, self._stop, self._include = tokenizer, stop, include_stop
    # A token's text can depend on its neighbours (a space is dropped at the start of a text, a character
    # spans tokens), so tokens are decoded behind a few earlier ones whose text is known.
    self._ids = [token for token in prompt[-CONTEXT:] if token < tokenizer.vocab_size]
    self._read = len(self._ids)  # tokens whose text has been read
    self._known = tokenizer.decode(self._ids, tidy=False)
    self._untidy = ""  # read, but what comes may change it
    self._held = ""  # read, but perhaps the start of a stop string
    self.stopped: str | None = None  # the stop string that ended the text

  def push(self, token: int, may_stop: bool = True) -> str:
    """The text that this token completes; without `may_stop` no stop string is looked for in it."""
    if token >= self._tokenizer.vocab_size:  # a row that pads the model's vocabulary
      return ""
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids, tidy=False)
    if text.endswith(UNFINISHED):
      return ""
    new = self._tidied(self._behind(text))
    last = self._tokenizer.decode(self._ids[self._read :], tidy=False)
    if last:  # special tokens alone are no context
      self._ids, text = self._ids[self._read :], last
    self._read, self._known = len(self._ids), text
    if may_stop:
      return self._release(new)
    text, self._held = self._held + new, ""
    return text

  def finish(self) -> str:
    """The rest of the text, when no more tokens come."""
    if self.stopped is not None:
      return ""
    text = self._release(self._tidied(self._behind(self._tokenizer.decode(self._ids, tidy=False)), last=True))
    rest, self._held = ("" if self.stopped is not None else self._held), ""
    return text + rest

  def _behind(self, text: str) -> str:
    """What of the text of all tokens is new; one of them may complete a character of which the prompt has a part."""
    whole = self._known.rstrip(UNFINISHED)
    begin = len(whole)
    while begin < len(self._known) and text.startswith(UNFINISHED, begin):
      begin += 1
    return text[begin:]

  def _tidied(self, new: str, last: bool = False) -> str:
    """What of the text can be told when `new` has come; all of it when it is the `last`."""
    if not self._tokenizer.tidies:
      return new
    text = self._untidy + new
    end = len(text) if last else max((found.start() for found in _PARTS.finditer(text)), default=0)
    self._untidy = text[end:]
    return tidied(text[:end])

  def _release(self, new: str) -> str:
    text = self._held + new
    found = [(text.find(stop), stop) for stop in self._stop if stop in text]
    if found:
      end, self.stopped = min(found)
      self._held = ""
      return text[: end + len(self.stopped) * self._include]
    held = max((_overlap(text, stop) for stop in self._stop), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that begins `stop`."""
  return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

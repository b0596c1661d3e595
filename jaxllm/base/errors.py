"""Errors that are the user's to mend: each message is one line that says what is wrong and what to do.

The doors print such an error without a traceback and exit with code 2; anything else is a bug of ours.
"""

import re
from typing import Any, ClassVar

MAX_MESSAGE = 480  # characters; of a longer one the middle is left out
MAX_VALUE = 60  # of a stranger's value in it


class UserError(Exception):
  """Something outside the program is wrong; the message says what, and what to do about it.

  As text it is one line without control characters, whatever a stranger's file has put in it.
  """

  max_length: ClassVar[int] = MAX_MESSAGE  # more where all of a long message is ours

  def __str__(self) -> str:
    return one_line(super().__str__(), self.max_length)


class ConfigError(UserError):
  """The config names an unknown key, has a wrong type, or asks for an impossible combination."""


class DataError(UserError):
  """A corpus, shard or tokenizer is missing, empty, damaged, or does not fit the model."""


class CheckpointError(UserError):
  """A checkpoint is missing, damaged, belongs to another model, or cannot be written."""


def one_line(value: object, limit: int = MAX_MESSAGE) -> str:
  """A text, or what an error says, as one line of at most `limit` characters: its lines joined, what is not printable
  escaped, the middle of a long one left out."""
  text = str(value)
  if not text.isprintable():
    text = re.sub(r"[\r\n]\s*", " ", text[: 8 * limit]).strip()
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
  if len(text) <= limit:
    return text
  end = limit // 3
  return f"{text[: limit - end - 5]} ... {text[-end:]}"


def shown(value: Any) -> str:
  """A stranger's value in a message: as Python spells it, short and printable."""
  try:
    text = repr(value[:MAX_VALUE] if isinstance(value, str | bytes) else value)
  except (ValueError, RecursionError):  # an integer of more digits than Python writes, or too deep
    text = f"a {type(value).__name__} that is too large to show"
  if isinstance(value, str | bytes) and len(value) > MAX_VALUE:
    text += "..."
  text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: 2 * MAX_VALUE])
  return text if len(text) <= MAX_VALUE + 5 else f"{text[: MAX_VALUE - 3]}..."

"""Regular expressions of strangers and of configs, with Python's meaning and an end.

A pattern that cannot take long is matched here; any other in a process with limits (see `jaxllm.base.bounded`), all
texts at once, and what came out is kept.
"""

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from jaxllm.base import bounded
from jaxllm.base.errors import ConfigError, shown

How = Literal["match", "fullmatch", "search"]
ALL_SECONDS = 4.0
MAX_KEPT = 1 << 18
_PROGRAM = Path(__file__).with_name("pattern_program.py")
_found: dict[tuple[How, str, str], str | None] = {}  # of what took the other process


def prepare(what: str, patterns: Iterable[str], texts: Iterable[str] = (), how: How = "fullmatch") -> None:
  """Compiles patterns and matches each with all texts, so that `find` knows the results.

  Args:
    what: has the patterns, for messages.

  Raises:
    ConfigError: one is no regular expression, or matching takes longer than all of them may.
  """
  texts, begin = list(texts), time.monotonic()
  for pattern in dict.fromkeys(patterns):
    try:
      _find(how, pattern, texts)
    except ConfigError as error:
      raise ConfigError(f"{what}: {error}") from None
    if time.monotonic() - begin > ALL_SECONDS:
      raise ConfigError(f"{what}: its patterns, {shown(pattern)} among them, take too long to match")


def find(pattern: str, text: str, how: How = "fullmatch") -> str | None:
  """What the last group of a pattern's match has, "" where there is none; None: it does not match.

  Raises:
    ConfigError: it is no regular expression, or takes too long.
  """
  return _find(how, pattern, [text])[0]


def matches(pattern: str, text: str) -> bool:
  """`re.fullmatch`."""
  return find(pattern, text) is not None


def _find(how: How, pattern: str, texts: list[str]) -> list[str | None]:
  if _is_quick(pattern):
    try:
      compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
      raise _broken(pattern, str(error)) from None
    found = [getattr(compiled, how)(text) for text in texts]
    return [None if match is None else match[compiled.groups] or "" for match in found]
  global _found
  kept = _found  # it only grows: who makes room, this call or a thread beside it, begins another one
  known = {text: kept[key] for text in texts if (key := (how, pattern, text)) in kept}
  new = [text for text in dict.fromkeys(texts) if text not in known]
  if new or not texts:
    try:
      answers = json.loads(bounded.run(_PROGRAM, json.dumps([how, pattern, new])))
    except bounded.Exceeded as error:
      raise ConfigError(f"the pattern {shown(pattern)} takes too long to match: {error}") from None
    except bounded.Failed as error:
      raise _broken(pattern, str(error).partition(": ")[2]) from None
    results = dict(zip(new, answers, strict=True))
    if len(kept) + len(new) > MAX_KEPT:
      kept = _found = {}
    kept.update({(how, pattern, text): answer for text, answer in results.items()})
    known |= results
  return [known[text] for text in texts]


def _is_quick(pattern: str) -> bool:
  """Whether a pattern takes no more steps than a small power of the text's length: no group repeats, little else."""
  if len(pattern) > 1000 or "(?" in pattern or re.search(r"\)[*+?{]", pattern):
    return False
  if re.search(r"\[\^?\[|--|&&|~~|\|\|", pattern):  # of which Python warns
    return False
  return sum(map(pattern.count, "*+{")) <= 2 and sum(map(pattern.count, "?|")) <= 8


def _broken(pattern: str, reason: str) -> ConfigError:
  return ConfigError(f"{shown(pattern)} is not a regular expression: {reason}")

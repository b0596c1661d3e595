"""Regular expressions of strangers, matched in a process with limits (`base.bounded`). This file imports no jaxllm."""

import json
import re


class Broken(Exception):
  """It is no regular expression; the message says why."""


def run(request: str) -> str:
  """JSON of what the last group of each text's match has ("" where there is none), null where it does not match.

  Args:
    request: JSON of a method of a compiled pattern, the pattern, and the texts.
  """
  how, pattern, texts = json.loads(request)
  try:
    compiled = re.compile(pattern)
  except (re.error, OverflowError, RecursionError) as error:
    raise Broken(str(error)) from error
  found = [getattr(compiled, how)(text) for text in texts]
  return json.dumps([None if match is None else match[compiled.groups] or "" for match in found])

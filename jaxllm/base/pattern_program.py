"""Regular expressions of strangers, matched in a process with limits: see `base.bounded`. This file imports no jaxllm."""

import json
import re


class Broken(Exception):
  """It is no regular expression; the message says why."""


def run(request: str) -> str:
  """For each [pattern, text] of a JSON list, where a match of the start of the text ends, and its last group."""
  try:
    found = [re.compile(pattern).match(text) for pattern, text in json.loads(request)]
  except (re.error, OverflowError, RecursionError) as error:
    raise Broken(str(error)) from error
  return json.dumps([None if match is None else [match.end(), match[match.re.groups]] for match in found])

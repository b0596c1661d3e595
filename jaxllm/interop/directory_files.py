"""The files of directories of models and of runs: config.json, generation_config.json, a tokenizer's."""

import json
import os
from pathlib import Path
from typing import Any

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.os_errors import file_errors
from jaxllm.data.tokenizers import Tokenizer, find_tokenizer, load_tokenizer

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
CHECKPOINTS = "checkpoints"  # of a run
TOKENIZER = "tokenizer"  # of a run
# What is read where it is there, so that a directory with a manifest must not have one that the manifest has not
READ_IF_THERE = (
  *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*.model", "*.jinja"),
  *("vocab.json", "vocab.txt", "merges.txt", "additional_chat_templates/*.jinja", GENERATION_FILE),
)
# Of a run that does not train all weights: what its checkpoints leave out, and, if it began with fresh ones, where
START_FILE, START = "start.json", "start"
ADAPTER = "adapter"  # what a run with adapters has trained, in PEFT's form
START_ADAPTER = "start_adapter"  # of a run whose adapters began with singular values: these, not scaled


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    CheckpointError: no such file, or no object in it.
  """
  try:
    with file_errors(path):
      text = path.read_text(encoding="utf-8") if os.path.lexists(path) else None
    if text is None:
      raise CheckpointError(f"{path.parent} has no {path.name}")
    value = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise CheckpointError(f"cannot read {path}: {error}") from error
  if not isinstance(value, dict):
    raise CheckpointError(f"{path} holds no JSON object")
  return value


def write_json(path: Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_generation_config(directory: Path) -> dict[str, Any]:
  """generation_config.json, {} where there is none.

  Raises:
    CheckpointError: it cannot be read. ConfigError: the end-of-text tokens in it are not token ids.
  """
  if not (directory / GENERATION_FILE).is_file():
    return {}
  config = read_json(directory / GENERATION_FILE)
  ends = config.get("eos_token_id")
  if ends is not None and not all(isinstance(i, int) for i in (ends if isinstance(ends, list) else [ends])):
    raise ConfigError(f"{directory / GENERATION_FILE}: eos_token_id is {ends!r}, not a token id or a list of them")
  return config


def read_tokenizer(directory: Path) -> Tokenizer | None:
  """The tokenizer in a directory; None where there are no files of one (a model of bare token ids)."""
  return None if find_tokenizer(directory) is None else load_tokenizer(directory)

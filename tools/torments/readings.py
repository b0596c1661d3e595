"""All that a reader of an artifact gets from it, as one digest: two readings are the same or something was changed."""

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.base.errors import UserError
from jaxllm.config import load_config

TIMES = ("tokens_per_second", "step_time_s", "memory_gib")  # figures that are not the same twice
TEXT = "abc def ghij\n  jjj é 你"


class Digest:
  def __init__(self):
    self._hash = hashlib.sha256()

  def add(self, value: Any) -> None:
    if isinstance(value, dict):
      for name in sorted(value):
        self.add(name)
        self.add(value[name])
    elif isinstance(value, np.ndarray):
      self._hash.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    else:
      self._hash.update(repr(value).encode())

  def __str__(self) -> str:
    return self._hash.hexdigest()


def read_data(config: str) -> int:
  """Prints a digest of an epoch's batches, the held-out text and the tokenizer."""
  return _printed(_data, config)


def read_model(path: str) -> int:
  """Prints a digest of a model's settings, weights, logits and tokenizer."""
  return _printed(_model, path)


def resume(config: str, run: str) -> int:
  """Trains one step more, and prints a digest of its figures and of the weights."""
  from jaxllm.cli import run_door
  from jaxllm.train import main

  with contextlib.redirect_stdout(io.StringIO()) as said:
    code = run_door(main, [f"--config={config}", f"--workdir={run}", "--config.training.steps=9"])
  if code:
    return code
  found = _model(run)
  last = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-1])
  found.add({name: value for name, value in last.items() if name not in TIMES})
  print(found)
  print(said.getvalue(), file=sys.stderr)
  return 0


def _printed(read, path: str) -> int:
  import logging

  logging.basicConfig(format="%(message)s", level=logging.WARNING)
  try:
    print(read(path))
    return 0
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _data(path: str) -> Digest:
  from jaxllm.data.manifest import open_prepared
  from jaxllm.data.pipeline import train_batches

  run, found = load_config(path), Digest()
  prepared = open_prepared(run.data)
  settings = dict(batch_size=4, seq_len=32, seed=0, prepared=prepared)
  batches = train_batches(run.data, **settings)
  for _ in range(12):
    found.add({name: np.asarray(value) for name, value in next(batches).items()})
  batches.close()
  found.add(np.asarray(prepared.heldout_lengths()))
  for text in prepared.heldout_texts():
    found.add(text)
  for source in prepared.sources:
    found.add(np.asarray(prepared.token_counts(source, "heldout")))
  tokenizer = prepared.tokenizer()
  found.add(tokenizer.encode(TEXT))
  found.add(tokenizer.pieces())
  return found


def _model(path: str) -> Digest:
  import jax

  import jaxllm

  model, found = jaxllm.load_model(path), Digest()
  found.add(repr(model.config))
  found.add(json.dumps(model.generation, sort_keys=True))
  for leaf in jax.tree.leaves(model.params):
    found.add(np.asarray(leaf))
  found.add(np.asarray(model(np.arange(16)[None] % 300)))
  tokenizer = model.tokenizer
  found.add(None if tokenizer is None else [tokenizer.encode(TEXT), tokenizer.pieces(), tokenizer.chat_templates])
  return found

"""New tokens: the tokenizer, the embedding and the head grow together."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from jaxllm.base.errors import ConfigError
from jaxllm.data.tokenizers import load_tokenizer, with_tokens
from jaxllm.interop.stored import StoredModel
from jaxllm.interop.tensors import LazyTensor
from jaxllm.models.config import ModelConfig
from jaxllm.parallel.agreement import first_does
from jaxllm.peft.lora import Lora
from jaxllm.training.config import RunConfig

TABLE, HEAD = "embedding/tokens", "head"


def grown_tokenizer(path: str, tokens: Sequence[str], folder: Path) -> Path:
  """Where the tokenizer at a path stands with new tokens in it: beside the prepared data, written once.

  Raises:
    DataError: one of them is in the vocabulary already.
  """
  tokenizer = with_tokens(load_tokenizer(path), tokens)
  place = folder / f"tokenizer-{hashlib.sha256(json.dumps([tokenizer.fingerprint, *tokens]).encode()).hexdigest()[:12]}"
  first_does(lambda: None if place.exists() else tokenizer.save(place))
  return place


def grown(stored: StoredModel, tokens: Sequence[str], tokenizer: Path, vocab_size: int) -> StoredModel:
  """A model with rows for new tokens, which are the last of a tokenizer; they begin as the mean of the others.

  Args:
    tokenizer: where the one with the new tokens stands. vocab_size: the model's, if that is more.

  Raises:
    ConfigError: the model has no vocabulary of the tokenizer's size, or none to predict.
  """
  size = load_tokenizer(tokenizer).vocab_size
  first, config = size - len(tokens), stored.config
  if first > config.vocab_size:
    raise ConfigError(
      f"model_init.new_tokens: the tokenizer has {first} tokens before them and the model {config.vocab_size}; it is "
      "another model's"
    )
  vocab_size = max(size, config.vocab_size, vocab_size)
  axes = {TABLE: 0} | ({f"{HEAD}/weight": 1, f"{HEAD}/bias": 0} if config.head == "lm" else {})
  tensors = dict(stored.tensors)
  for path in axes.keys() & tensors.keys():
    tensors[path] = _longer(tensors[path], axes[path], first, vocab_size)
  return dataclasses.replace(stored, config=dataclasses.replace(config, vocab_size=vocab_size), tensors=tensors)


def _longer(tensor: LazyTensor, axis: int, first: int, size: int) -> LazyTensor:
  shape = tuple(size if i == axis else length for i, length in enumerate(tensor.shape))

  def read() -> np.ndarray:
    known = np.moveaxis(tensor.read(), axis, 0)[:first]
    mean = known.astype(np.float32).mean(0, keepdims=True).astype(known.dtype)
    return np.moveaxis(np.concatenate([known, np.repeat(mean, size - first, 0)]), 0, axis)

  return LazyTensor(shape, tensor.dtype, read)


def trains_new_tokens(run: RunConfig, model: ModelConfig, adapted: Collection[str] = ()) -> RunConfig:
  """The config, with the embedding and the head trained whole beside adapters, which could not learn a new token.

  Args:
    adapted: the parameters that an adapter in files changes, with which the run goes on.

  Raises:
    ConfigError: the embedding or the head is one of these.
  """
  if not isinstance(run.peft, Lora):
    return run
  own = (TABLE, HEAD) if model.head == "lm" and not model.tie_embeddings else (TABLE,)
  for name in own:
    if {name, f"{name}/weight"} & set(adapted):
      raise ConfigError(
        f"model_init.new_tokens: the adapter at peft.path {run.peft.path} has factors of {name}, which cannot learn "
        "new tokens; name it in model_init.adapter, which merges it, and train another"
      )
  saved = (*run.peft.modules_to_save, *(name for name in own if not run.peft.saves(name)))
  return dataclasses.replace(run, peft=dataclasses.replace(run.peft, modules_to_save=saved))

"""RUN/adapter: what a run with adapters has trained, in PEFT's form."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.base.errors import ConfigError
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.interop.adapted import changes_of
from jaxllm.interop.directory_files import ADAPTER
from jaxllm.interop.open import family_at
from jaxllm.interop.peft_write import write_adapter
from jaxllm.interop.stored import tensors_of
from jaxllm.models.build import Params
from jaxllm.models.weights import is_adapted, is_weight, map_weights_with_path
from jaxllm.parallel.agreement import first_does
from jaxllm.training.config import RunConfig

logger = logging.getLogger("jaxllm")


def write_run_adapter(
  directory: Path, run: RunConfig, params: Params, trained: Params, tokenizer: Tokenizer | None = None
) -> None:
  """Writes RUN/adapter, or puts it in place of an older one; all processes call it.

  Where no Hugging Face family can express the model, a line of the log says so.

  Args:
    directory: the run's. params: all parameters of the policy. trained: the same, with None for what is frozen.
    tokenizer: that the model was trained with.

  Raises:
    CheckpointError: the disk is full, or something else stands there.
  """
  if not run.peft.adapters_only:
    return
  whole: dict[str, Any] = {}

  def one(path, w, own):
    if is_adapted(w):
      return _on_this_host(w)
    if not is_weight(w) and own is not None:
      whole[path] = _gathered(own)
    return None

  alone = map_weights_with_path(one, params, trained)
  first_does(lambda: _write(directory / ADAPTER, run, alone, whole, tokenizer))


def _write(
  directory: Path, run: RunConfig, adapters: Params, whole: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
  init = run.model_init
  base = str(Path(init.path).expanduser().absolute()) if init.path else None
  try:
    write_adapter(
      directory,
      run.model,
      changes_of(adapters),
      tensors_of(whole),
      base=None if init.adapter else base,  # which by itself is another model
      family=family_at(Path(base)) if base else None,
      tokenizer=tokenizer,
    )
  except ConfigError as error:
    logger.warning("no %s is written: %s", directory, error)
    return
  if base is None:
    logger.info("%s belongs to the weights that this run began with, in %s", directory, directory.parent / "start")
  elif init.adapter:
    logger.info("%s belongs to %s with the adapter %s merged into it", directory, base, init.adapter)


def _on_this_host(w: Any) -> Any:
  """A weight whose adapters are on this host, and of what is under them no more than its shape."""
  if not is_adapted(w):
    return jax.ShapeDtypeStruct(w.shape, w.dtype)
  parts = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
  small = {name: _gathered(part) for name, part in parts.items() if isinstance(part, jax.Array)}
  inner = {name: _on_this_host(part) for name, part in parts.items() if name == "base"}
  return dataclasses.replace(w, **(small | inner))


def _gathered(x: jax.Array) -> np.ndarray:
  return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))

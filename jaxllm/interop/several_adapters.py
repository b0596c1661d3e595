"""Several adapters of one base, each for itself: what a batch may mix."""

import collections
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from jaxllm.base.errors import CheckpointError, ConfigError, UserError
from jaxllm.interop.adapter import StoredAdapter, place
from jaxllm.interop.open import Adapters, open_model, weighted, with_adapter
from jaxllm.interop.peft import TABLE
from jaxllm.interop.peft_config import base_of
from jaxllm.interop.stored import StoredModel
from jaxllm.models.build import declare
from jaxllm.models.config import ModelConfig
from jaxllm.models.multi_lora import Adapter
from jaxllm.models.weights import PerLayer
from jaxllm.parallel.config import AxisRules

log = logging.getLogger("jaxllm")

# Of what a base is named by an adapter, and the model: the difference of two matrices over their length. Four bits make
# it 0.1, fine-tuning less; of two models that have nothing to do with each other it is over 1.
SAME = 0.5


def open_adapters(
  base: StoredModel, adapters: Mapping[str, Adapters]
) -> tuple[StoredModel, dict[str, tuple[StoredAdapter, ...]]]:
  """The adapters that stand under these names, each of which is for `base`, and the base as all of them need it.

  Args:
    adapters: of each name a directory, or several as `open_model` takes them, which are added.

  Returns:
    the base, with a head of its own where it was the embedding and an adapter changes one of them alone; by name what
    is to be added.

  Raises:
    CheckpointError, ConfigError: as `open_model`; or an adapter was trained on another model, replaces parameters or
      brings tokens, which cannot differ within a batch. The message names the adapter.
  """
  directories = {name: weighted(adapter) for name, adapter in adapters.items()}
  opened = {name: _over(base, name, several) for name, several in directories.items()}
  if any(model.config.tie_embeddings != base.config.tie_embeddings for model in opened.values()):
    base = base.untied()
    opened = {name: _over(base, name, several) for name, several in directories.items()}
  found = {name: model.apart[len(base.apart) :] for name, model in opened.items()}
  for name, own in found.items():
    if opened[name].chat_template != base.chat_template:
      log.warning("adapter %r has a chat template of its own, which is not used: chats are the base's", name)
    if replaced := sorted(path for adapter in own for path in adapter.full):
      raise ConfigError(
        f"the adapter {name!r} replaces {replaced[0]}, which cannot differ within a batch; load the model with this "
        "adapter alone"
      )
    for adapter in own:
      _check_base(base, name, adapter)
    log.info("adapter %r: %s", name, summary(own))
  return base, found


def factors(
  adapters: tuple[StoredAdapter, ...], config: ModelConfig, mesh: Mesh | None = None, rules: AxisRules = AxisRules()
) -> Adapter:
  """What adapters add to a model of this config, read from their files, float32, each layer apart.

  Args:
    mesh: they are placed over its devices by `rules`; None: on this process's first device.
  """
  axes = traverse_util.flatten_dict(declare(config)[2], sep="/")
  found: dict[str, Any] = {}
  for adapter in adapters:
    for path, change in adapter.changes.items():
      bare = PerLayer((None,) * len(change.where)) if "blocks" in path.split("/") else None
      found[path] = place(change, found.get(path, bare), axes[path], mesh, rules)
  return found


def _over(base: StoredModel, name: str, directories: list[tuple[Path, float]]) -> StoredModel:
  model = base
  try:
    for directory, weight in directories:
      model = with_adapter(model, directory, weight)
  except UserError as error:
    raise type(error)(f"the adapter {name!r}: {error}") from error
  return model


def _check_base(base: StoredModel, name: str, adapter: StoredAdapter) -> None:
  """That the model which an adapter names is this one, if it is here: by what one of the matrices holds, since the same
  model may stand in many files, in other formats too."""
  try:
    directory = base_of(adapter.path)
    if base.path is not None and directory.resolve() == base.path.resolve():
      return
    named = open_model(directory)
  except UserError:  # it is not here, or nothing that can be opened
    return
  path = next((path for path in adapter.changes if path in named.tensors), TABLE)
  where = adapter.changes[path].where if path in adapter.changes else np.ones(())
  theirs, ours = (model.tensors[path] for model in (named, base))
  if theirs.shape == ours.shape:
    index = tuple(map(int, np.argwhere(where)[0]))
    a, b = (tensor.part(index).astype(np.float32) for tensor in (theirs, ours))
    if np.linalg.norm(a - b) <= SAME * np.linalg.norm(a):
      return
  raise CheckpointError(
    f"the adapter {name!r} in {adapter.path} belongs to {named.path}, which is another model than {base.path}"
  )


def summary(adapters: tuple[StoredAdapter, ...]) -> str:
  """What adapters change, by how many matrices of each kind there are, with their ranks."""
  counts: collections.Counter[str] = collections.Counter()
  ranks = set()
  for adapter in adapters:
    for path, change in adapter.changes.items():
      counts[path.removesuffix("/weight").removeprefix("blocks/")] += int(change.where.sum())
      ranks.add(change.rank)
  kinds = sorted({adapter.kind for adapter in adapters})
  of_each = ", ".join(f"{kind} x {count}" for kind, count in sorted(counts.items()))
  return f"{' and '.join(kinds)} of rank {', '.join(map(str, sorted(ranks)))} on {of_each}"

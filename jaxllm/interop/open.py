"""`open_model`: models in files, of every form, opened without reading their weights."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.base import digests
from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import local_path, recover
from jaxllm.base.os_errors import file_errors
from jaxllm.interop import peft
from jaxllm.interop.adapter import Change, StoredAdapter
from jaxllm.interop.directory_files import (
  ADAPTER,
  CHECKPOINTS,
  CONFIG_FILE,
  READ_IF_THERE,
  START,
  START_ADAPTER,
  START_FILE,
  TOKENIZER,
  read_generation_config,
  read_json,
  read_start,
  read_tokenizer,
  source_of,
)
from jaxllm.interop.families import READ_AS
from jaxllm.interop.fingerprint import check_unchanged
from jaxllm.interop.gguf import read_gguf
from jaxllm.interop.huggingface import from_huggingface
from jaxllm.interop.huggingface_directory import as_checkpoint, families_of, family_to_write, open_huggingface
from jaxllm.interop.model_directory import open_model_directory, read_model_config
from jaxllm.interop.peft_config import CONFIG_FILE as ADAPTER_FILE
from jaxllm.interop.peft_config import base_of, is_adapter
from jaxllm.interop.stored import Form, StoredModel, check_shapes, param_shapes
from jaxllm.interop.tensors import LazyTensor, Tensors, from_parts
from jaxllm.models.config import ModelConfig
from jaxllm.models.quantization import quantize_matrix
from jaxllm.models.weights import dense, is_quantizable
from jaxllm.storage.reading import open_params

Adapters = str | Path | Sequence[str | Path | tuple[str | Path, float]] | None


def open_model(
  path: str | Path,
  *,
  adapter: Adapters = None,
  step: int | None = None,
  merge: bool = True,
  own_apart: bool = False,
) -> StoredModel:
  """Opens a model directory, a training run's (its latest checkpoint, or that of `step`), a Hugging Face
  model's, a PEFT LoRA or DoRA adapter's (its base is where adapter_config.json says), or a .gguf file.

  Names, shapes and types of all weights are checked; so are the checksums of a model directory.

  Args:
    adapter: a PEFT adapter's directory, for the model at `path`; or several, (directory, weight) where not all of one
      is to be added.
    merge: adapters are merged into the weights; else they stand apart in `StoredModel.apart`.
    own_apart: that holds for a run's own adapters too, which are merged without it: a run is a model.

  Raises:
    CheckpointError: no such path, not a model, or damaged. ConfigError: a URL, a model that cannot be expressed,
      or a `step` of what has none. DataError: the tokenizer is damaged.
  """
  path = local_path(path)
  try:
    return _opened(path, adapter, step, merge, own_apart)
  except RecursionError:
    raise CheckpointError(f"{path} stands on itself: it names a model that names it as what it began with") from None


def _opened(path: Path, adapter: Adapters, step: int | None, merge: bool, own_apart: bool) -> StoredModel:
  form = form_of(path)
  if step is not None and form != "run":
    raise ConfigError(f"{path} is not a training run and has no steps; leave --step out")
  if form == "run":
    model = _open_run(path, step)
    model = model if own_apart else model.merged()
  elif form == "adapter":
    base = open_model(base_of(path), merge=False)
    model = dataclasses.replace(with_adapter(base, path), path=path, form="adapter")
  elif form == "hf":
    model = open_huggingface(path)
  elif form == "gguf":
    model = _open_gguf(path)
  else:
    model = open_model_directory(path)
  for directory, weight in weighted(adapter):
    model = with_adapter(model, directory, weight)
  return model.merged() if merge else model


def weighted(adapter: Adapters) -> list[tuple[Path, float]]:
  """The directories of adapters and their weights."""
  several = [adapter] if isinstance(adapter, str | Path) else adapter or []
  return [(local_path(one), 1.0) if isinstance(one, str | Path) else (local_path(one[0]), one[1]) for one in several]


def form_of(path: Path) -> Form:
  """What kind of model stands at a path, by the names of its files and the keys of config.json.

  Raises:
    CheckpointError: none; the message says what does stand there, or config.json cannot be read.
  """
  recover(path)
  if not path.exists():
    with file_errors(path, "no model at"):
      path.stat()
  if path.is_file() and path.suffix == ".gguf":
    return "gguf"
  has_config = (path / CONFIG_FILE).is_file()
  is_huggingface = has_config and "model_type" in read_json(path / CONFIG_FILE)
  if (path / CHECKPOINTS).is_dir() and not is_huggingface:
    return "run"
  if is_adapter(path):
    return "adapter"
  if has_config:
    return "hf" if is_huggingface else "jaxllm"
  raise CheckpointError(
    f"{path} is not a model but {_described(path)}: a model, Hugging Face or training run's directory has a "
    f"{CONFIG_FILE}, an adapter's a {ADAPTER_FILE}, and a file ends in .gguf"
  )


def _described(path: Path) -> str:
  if not path.is_dir():
    return "a file"
  names = sorted(file.name for file in path.iterdir())
  more = f" and {len(names) - 3} more" if len(names) > 3 else ""
  return f"a directory with {', '.join(names[:3])}{more}" if names else "an empty directory"


def with_adapter(base: StoredModel, directory: Path, weight: float = 1.0) -> StoredModel:
  """The model with an adapter apart; what `base` was trained on says nothing of that, so it goes.

  Raises:
    ConfigError: it is the run's own, besides what `open_adapter` raises.
  """
  if base.form == "run" and base.path and (base.path / ADAPTER).resolve() == directory.resolve():
    raise ConfigError(f"{directory} is what {base.path} has trained, which is in its weights already; leave it out")
  with file_errors(directory):
    recover(directory)
    digests.check(directory, READ_IF_THERE, quiet=not (directory.parent / CHECKPOINTS).is_dir())
  families = _families(base)
  if not families:
    as_checkpoint(base)  # says why
  read = peft.read_adapter(directory, base.config, families)
  if read.head and (base.config.tie_embeddings or base.was_tied):
    read = read.of_tied(apart=base.was_tied)
    if not read.tied and not base.was_tied:
      base = base.untied()
  if rows := read.vocabulary:  # it may have been trained on a model with new tokens
    base = dataclasses.replace(base, config=dataclasses.replace(base.config, vocab_size=rows))
  adapter = peft.open_adapter(read, base.config, base.tensors).weighted(weight)
  for other in base.apart:
    if both := sorted(other.full.keys() & adapter.full.keys()):
      raise ConfigError(f"the adapters in {other.path} and {directory} both replace {both[0]}; leave one out")
  model = dataclasses.replace(
    base,
    tensors=dict(base.tensors) | adapter.full,
    tokenizer=read_tokenizer(directory) or base.tokenizer,
    run={},
    adapters=(*base.adapters, adapter.settings),
    apart=(*base.apart, adapter),
  )
  check_shapes(model.config, model.tensors, directory)
  return model


def _families(model: StoredModel) -> tuple[str, ...]:
  """By whose names an adapter of the model may go: its own family's, or of all that can express it."""
  own = family_at(model.path) if model.form == "hf" and model.path else None
  return (own,) if own else families_of(model.config)


def family_at(path: Path) -> str | None:
  """The family of a Hugging Face model's directory, or that which what was made from one is written as; None: that is
  not known."""
  config = read_json(path / CONFIG_FILE) if (path / CONFIG_FILE).is_file() else {}
  kind = config.get("model_type")
  return READ_AS.get(str(kind), kind) if kind else family_to_write(_source_at(str(path)).get("model_type"))


def _open_run(directory: Path, step: int | None) -> StoredModel:
  """A run's model, its own adapters apart."""
  sealed = digests.check(directory, [f"{TOKENIZER}/{pattern}" for pattern in READ_IF_THERE])
  config = read_model_config(directory)
  tensors: Tensors = {name: LazyTensor(*array) for name, array in open_params(directory / CHECKPOINTS, step).items()}
  own: tuple[StoredAdapter, ...] = ()
  if (directory / START_FILE).is_file():
    record = read_start(directory)
    changes = _own_changes(directory, record, tensors)
    own = (StoredAdapter({"peft_type": "LORA"}, changes, {}, directory),) if changes else ()
    tensors = _with_start(config, directory, record, tensors)
  check_shapes(config, tensors, directory / CHECKPOINTS)
  tokenizer, generation = read_tokenizer(directory / TOKENIZER), read_generation_config(directory)
  if tokenizer is None and not sealed:
    raise CheckpointError(f"{directory} has no {TOKENIZER}/, which every run has; put back what was there")
  groups = {name: group for name, group in read_json(directory / CONFIG_FILE).items() if isinstance(group, dict)}
  source = _source_at(groups.get("model_init", {}).get("path"))
  return StoredModel(config, tensors, tokenizer, generation, directory, "run", groups, apart=own, source=source)


def _source_at(path: Any) -> dict[str, Any]:
  """`StoredModel.source` of what a run began with; {}: it began with nothing, or that is no directory any more."""
  file = Path(path) / CONFIG_FILE if isinstance(path, str) and path else None
  if file is None or not file.is_file():
    return {}
  config = read_json(file)
  before = config.get("model_init")
  return _source_at(before.get("path")) if isinstance(before, dict) else source_of(config, file)


def _with_start(
  config: ModelConfig, directory: Path, record: dict[str, Any], trained: Tensors
) -> dict[str, LazyTensor]:
  """All parameters of a run that trains some of them, but for adapters: those, and what it began with."""
  if record["path"] == START:
    base = {name: LazyTensor(*array) for name, array in open_params(directory / START, 0).items()}
  else:
    model = open_model(record["path"], adapter=record["adapter"], step=record["step"])
    check_unchanged(directory, record)
    base = dict((model if config.tie_embeddings else model.untied() if model.config.tie_embeddings else model).tensors)
  tensors: dict[str, LazyTensor] = {}
  for path in param_shapes(config):
    if path in trained:
      tensors[path] = trained[path]
    elif f"{path}/base" in trained:  # the config trains what stands under the adapter too
      tensors[path] = trained[f"{path}/base"]
    elif path in base:
      tensors[path] = _as_rounded(path, base[path], record)
  return tensors


def _own_changes(directory: Path, record: dict[str, Any], trained: Tensors) -> dict[str, Change]:
  """What a run's adapters make of the parameters that it began with.

  One that began with singular values has these beside it, taken away: it is of twice the rank.
  """
  kept: Tensors = {}
  if (directory / START_ADAPTER).is_dir():
    kept = {name: LazyTensor(*array) for name, array in open_params(directory / START_ADAPTER, 0).items()}
  changes = {}
  for path, scale in record["scales"].items():
    a, b, magnitude = (trained.get(f"{path}/{part}") for part in ("a", "b", "magnitude"))
    if a is None or b is None or min(len(a.shape), len(b.shape)) < 2:
      raise CheckpointError(f"{directory / START_FILE} names an adapter of {path}, which the checkpoint has not")
    lead = a.shape[:-2]
    try:
      factor = np.broadcast_to(np.asarray(scale, np.float64), lead)
    except ValueError:
      raise CheckpointError(f"{directory / START_FILE} has scales of {path} that do not fit its {lead}") from None
    if f"{path}/a" in kept:  # scale a₀ b₀, for factors that are not divided by the root of it
      b = _joined(b, kept[f"{path}/b"], -2, -1 / factor)
      a = _joined(a, kept[f"{path}/a"], -1, np.ones(lead))
    lengths = None if magnitude is None else _once(magnitude)
    changes[path] = Change(_once(a), _once(b), factor, np.ones(lead, bool), lengths)
  return changes


def _joined(first: LazyTensor, second: LazyTensor, axis: int, factor: np.ndarray) -> LazyTensor:
  shape = list(first.shape)
  shape[axis] += second.shape[axis]
  factor = factor[..., None, None].astype(np.float32)
  return LazyTensor(tuple(shape), first.dtype, lambda: np.concatenate([first.read(), second.read() * factor], axis))


def _once(tensor: LazyTensor) -> LazyTensor:
  """The tensor, read whole when a part is asked for first."""
  return dataclasses.replace(tensor, read=functools.cache(tensor.read), stacked=0, read_part=None)


def _as_rounded(path: str, tensor: LazyTensor, record: dict[str, Any]) -> LazyTensor:
  """A parameter as the run had it, which may have quantized it."""
  if record["quantize"] is None or not is_quantizable(path):
    return tensor
  settings = record["quantize"], record["group_size"], record.get("double_quantize", False)

  def layer(index):
    return np.asarray(dense(quantize_matrix(path, jnp.asarray(tensor.part(index)), *settings), tensor.dtype))

  return from_parts(tensor.shape, tensor.dtype, len(tensor.shape) - 2, layer)


def _open_gguf(path: Path) -> StoredModel:
  file = read_gguf(path)
  config, tensors = from_huggingface(file.config, file.tensors)
  names = file.config.get("id2label", {})
  source = {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}} if names else {}
  about: dict[str, Any] = {"source": source, "vectors": file.vectors}
  return StoredModel(config, tensors, file.tokenizer(), file.generation, path, "gguf", **about)

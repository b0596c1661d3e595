"""`open_model`: models in files, of every form, opened without reading their weights."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import local_path
from jaxllm.interop import peft
from jaxllm.interop.directory_files import CONFIG_FILE, read_generation_config, read_json, read_tokenizer
from jaxllm.interop.gguf import read_gguf
from jaxllm.interop.huggingface import from_huggingface
from jaxllm.interop.huggingface_directory import as_checkpoint, families_of, open_huggingface
from jaxllm.interop.model_directory import open_model_directory, read_model_config
from jaxllm.interop.peft_config import CONFIG_FILE as ADAPTER_FILE
from jaxllm.interop.peft_config import base_of, is_adapter
from jaxllm.interop.stored import Form, StoredModel, check_shapes, param_shapes
from jaxllm.interop.tensors import LazyTensor, Tensors, from_parts
from jaxllm.models.config import ModelConfig
from jaxllm.models.quantization import quantize_matrix
from jaxllm.models.weights import dense, is_quantizable
from jaxllm.storage.reading import open_params

TABLE = "embedding/tokens"
CHECKPOINTS = "checkpoints"
# Of a run that does not train all weights: what its checkpoints leave out, and, if it began with fresh ones, where
START_FILE, START = "start.json", "start"


Adapters = str | Path | Sequence[str | Path | tuple[str | Path, float]] | None


def open_model(
  path: str | Path, *, adapter: Adapters = None, step: int | None = None, merge: bool = True
) -> StoredModel:
  """Opens a model directory, a training run's (its latest checkpoint, or that of `step`), a Hugging Face
  model's, a PEFT LoRA or DoRA adapter's (its base is where adapter_config.json says), or a .gguf file.

  Names, shapes and types of all weights are checked; so are the checksums of a model directory.

  Args:
    adapter: a PEFT adapter's directory, for the model at `path`; or several, (directory, weight) where not all of one
      is to be added.
    merge: adapters are merged into the weights; else they stand apart in `StoredModel.apart` (of a run's own adapters
      that does not hold, they are always merged).

  Raises:
    CheckpointError: no such path, not a model, or damaged. ConfigError: a URL, a model that cannot be expressed,
      or a `step` of what has none. DataError: the tokenizer is damaged.
  """
  path = local_path(path)
  form = form_of(path)
  if step is not None and form != "run":
    raise ConfigError(f"{path} is not a training run and has no steps; leave --step out")
  if form == "run":
    model = _open_run(path, step)
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
  if not path.exists():
    raise CheckpointError(f"no model at {path}: there is no such path")
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
  """The model with an adapter apart; what `base` was trained on says nothing of that, so it goes."""
  families = _families(base)
  if base.config.tie_embeddings and families and peft.changes_tied_table(directory, families[0]):
    changed = any(TABLE in adapter.changes for adapter in base.apart)
    base = (base.merged() if changed else base).untied()
    families = _families(base)
  if not families:
    as_checkpoint(base.config, base.tensors)  # says why
  adapter = peft.open_adapter(directory, base.config, base.tensors, families).weighted(weight)
  for other in base.apart:
    if both := sorted(other.full.keys() & adapter.full.keys()):
      raise ConfigError(f"the adapters in {other.path} and {directory} both replace {both[0]}; leave one out")
  return dataclasses.replace(
    base,
    tensors=dict(base.tensors) | adapter.full,
    tokenizer=read_tokenizer(directory) or base.tokenizer,
    run={},
    adapters=(*base.adapters, adapter.settings),
    apart=(*base.apart, adapter),
  )


def _families(model: StoredModel) -> tuple[str, ...]:
  """By whose names an adapter of the model may go: its own family's, or of all that can express it."""
  own = family_at(model.path) if model.form == "hf" and model.path else None
  return (own,) if own else families_of(model.config)


def family_at(path: Path) -> str | None:
  """The family of a Hugging Face model's directory; None: there stands something else."""
  return read_json(path / CONFIG_FILE).get("model_type") if (path / CONFIG_FILE).is_file() else None


def _open_run(directory: Path, step: int | None) -> StoredModel:
  config = read_model_config(directory)
  tensors: Tensors = {name: LazyTensor(*array) for name, array in open_params(directory / CHECKPOINTS, step).items()}
  if (directory / START_FILE).is_file():
    tensors = _with_start(config, directory, tensors)
  check_shapes(config, tensors, directory / CHECKPOINTS)
  tokenizer, generation = read_tokenizer(directory / "tokenizer"), read_generation_config(directory)
  groups = {name: group for name, group in read_json(directory / CONFIG_FILE).items() if isinstance(group, dict)}
  return StoredModel(config, tensors, tokenizer, generation, directory, "run", groups)


def _with_start(config: ModelConfig, directory: Path, trained: Tensors) -> Tensors:
  """All parameters of a run that trains some of them: those, adapters merged, on top of what it began with."""
  record = read_json(directory / START_FILE)
  if record["path"] == START:
    base = {name: LazyTensor(*array) for name, array in open_params(directory / START, 0).items()}
  else:
    base = dict(open_model(record["path"], adapter=record["adapter"], step=record["step"]).tensors)
  tensors: dict[str, LazyTensor] = {}
  for path in param_shapes(config):
    if path in trained:
      tensors[path] = trained[path]
      continue
    if f"{path}/base" in trained:  # the config trains what stands under the adapter too
      tensors[path] = trained[f"{path}/base"]
    elif path in base:
      tensors[path] = _as_rounded(path, base[path], record["quantize"], record["group_size"])
    if f"{path}/a" in trained:
      change = (trained[f"{path}/a"], trained[f"{path}/b"], record["scales"][path])
      tensors[path] = _with_change(tensors[path], *change)
  return tensors


def _as_rounded(path: str, tensor: LazyTensor, format: str | None, group_size: int | None) -> LazyTensor:
  """A parameter as the run had it, which may have quantized it."""
  if format is None or not is_quantizable(path):
    return tensor

  def layer(index):
    return np.asarray(dense(quantize_matrix(path, jnp.asarray(tensor.part(index)), format, group_size), tensor.dtype))

  return from_parts(tensor.shape, tensor.dtype, len(tensor.shape) - 2, layer)


def _with_change(tensor: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
  """A stack of matrices plus the products of an adapter's, each when it is read."""
  narrow = functools.cache(lambda: (a.read(), b.read()))

  def layer(index):
    change = np.matmul(*(x[index] for x in narrow())) * np.float32(scale)
    return (tensor.part(index).astype(np.float32) + change).astype(tensor.dtype)

  return from_parts(tensor.shape, tensor.dtype, len(tensor.shape) - 2, layer)


def _open_gguf(path: Path) -> StoredModel:
  file = read_gguf(path)
  config, tensors = from_huggingface(file.config, file.tensors)
  return StoredModel(config, tensors, file.tokenizer(), file.generation, path, "gguf")

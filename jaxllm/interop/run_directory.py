"""A training run's directory seen as a model: config.json, a checkpoint's weights, tokenizer/."""

from pathlib import Path
from typing import Any

from jaxllm.interop.directory_files import CONFIG_FILE, read_generation_config, read_json, read_tokenizer
from jaxllm.interop.model_directory import read_model_config
from jaxllm.interop.stored import StoredModel, TrainedOn, check_shapes

CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer"


def open_run(directory: Path, step: int | None = None) -> StoredModel:
  """The newest good checkpoint of a run, or that of `step`.

  Raises:
    CheckpointError: there is no such checkpoint, or it is damaged or another model's.
    ConfigError: config.json says an impossible model. DataError: the tokenizer is damaged.
  """
  from jaxllm.training.checkpoints import open_params  # the one import that looks up, see pyproject.toml

  config = read_model_config(directory)
  tensors = open_params(directory, step)
  check_shapes(config, tensors, directory / CHECKPOINTS)
  tokenizer, generation = read_tokenizer(directory / TOKENIZER), read_generation_config(directory)
  return StoredModel(config, tensors, tokenizer, generation, directory, "run", _trained_on(directory))


def _trained_on(directory: Path) -> TrainedOn:
  config = read_json(directory / CONFIG_FILE)

  def value(group: str, key: str, kind: type) -> Any:
    found = config[group].get(key) if isinstance(config.get(group), dict) else None
    return found if isinstance(found, kind) else None

  return TrainedOn(value("data", "dir", str), value("objective", "name", str), value("training", "seq_len", int))

"""Hugging Face checkpoints to parameters and back, by the tables in `families`."""

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from jaxllm.errors import CheckpointError, ConfigError
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.families.rope import canonical_rope
from jaxllm.interop.families.table import Family, Shape, Weight, shortest_period
from jaxllm.models.build import Params, declare
from jaxllm.models.config import ModelConfig

# Buffers that old checkpoints hold and that follow from the config.
BUFFERS = (
  "*.rotary_emb.inv_freq",
  "*.attn.bias",
  "*.attn.masked_bias",
  "*.attention.bias",
  "*.attention.masked_bias",
)


class _Keys(dict):
  def __missing__(self, key):
    raise ConfigError(f"config.json lacks {key!r}, which a {self['model_type']} model needs")


def family_of(config: Mapping[str, Any]) -> Family:
  """The family of a config.json.

  Raises:
    ConfigError: no or an unknown `model_type`.
  """
  name = config.get("model_type")
  if name not in FAMILIES:
    known = ", ".join(FAMILIES)
    raise ConfigError(f"config.json has model_type {name!r}; those that can be read are {known}")
  return FAMILIES[name]


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
  """The ModelConfig that a config.json describes.

  Raises:
    ConfigError: an unknown family, a missing key, or a setting that no ModelConfig can express.
  """
  family = family_of(config)
  hf = _Keys(dict(family.defaults) | dict(config))
  for key, value in family.requires.items():
    if config.get(key, value) != value:
      raise ConfigError(f"config.json has {key} = {config[key]!r}; a {family.name} here can only have {value!r}")
  fields = {ours: hf[theirs] for ours, theirs in family.keys.items()}
  fields = {name: value for name, value in fields.items() if value is not None}
  return ModelConfig(**(fields | dict(family.fields) | family.read(hf)))


def config_to_huggingface(config: ModelConfig, family: str) -> dict[str, Any]:
  """The config.json of a model, as the `model_type` `family`.

  Raises:
    ConfigError: the family has no word for something that the model is.
  """
  if family not in FAMILIES:
    raise ConfigError(f"unknown family {family!r}; those that can be written are {', '.join(FAMILIES)}")
  table, c = FAMILIES[family], _canonical(config)
  hf = {"model_type": family, "architectures": [table.architecture]}
  hf |= {theirs: getattr(c, ours) for ours, theirs in table.keys.items()} | table.write(c)
  back = _canonical(config_from_huggingface(hf))
  for field in dataclasses.fields(ModelConfig):
    want, got = getattr(c, field.name), getattr(back, field.name)
    if want != got and field.name not in ("init", "init_std"):
      raise ConfigError(f"a {family} checkpoint cannot say model.{field.name} = {want!r}; it would say {got!r}")
  return hf


def params_from_huggingface(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> tuple[ModelConfig, Params]:
  """The ModelConfig and the parameters of a checkpoint.

  Args:
    config: the content of config.json.
    tensors: by name, with or without the family's prefix; each is looked up once, so that a mapping may
      read them lazily. They keep their dtype.

  Returns:
    the config, and a nested dict of numpy arrays shaped as `declare` says.

  Raises:
    ConfigError: see `config_from_huggingface`.
    CheckpointError: a tensor is missing, unexpected or of another shape; the message names it.
  """
  family, c = family_of(config), config_from_huggingface(config)
  shapes = _shapes(c)
  names = {_full_name(name, family): name for name in tensors}
  params: dict[str, np.ndarray] = {}
  for weight, name, layer, wanted in _expected(family, c, shapes):
    if name not in names:
      raise CheckpointError(f"the checkpoint lacks the tensor {name} (for {', '.join(weight.ours)})")
    tensor = tensors[names.pop(name)]
    if tensor.shape != wanted:
      raise CheckpointError(f"the tensor {name} has shape {tensor.shape}; config.json calls for {wanted}")
    pieces = weight.transform.read(c, tensor, [shapes[path] for path in weight.ours])
    for path, piece in zip(weight.ours, pieces, strict=True):
      if layer is None:
        params[path] = piece
        continue
      if layer == 0:
        params[path] = np.empty((c.num_layers, *piece.shape), piece.dtype)
      params[path][layer] = piece
  tied = c.tie_embeddings and family.head in names
  if tied and not np.array_equal(tensors[names.pop(family.head)], params["embedding/tokens"]):
    raise CheckpointError(
      f"config.json ties the embeddings but the tensor {family.head} differs from them; "
      "set its tie_word_embeddings to false"
    )
  unexpected = [n for n in names if not any(fnmatch.fnmatch(n, buffer) for buffer in BUFFERS)]
  if unexpected:
    more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
    raise CheckpointError(
      f"the checkpoint has the tensor {unexpected[0]}{more}, which this config.json does not call for"
    )
  return c, traverse_util.unflatten_dict(params, sep="/")


def params_to_huggingface(
  config: ModelConfig, family: str, params: Params
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """The content of config.json and the tensors by name; the inverse of `params_from_huggingface`.

  A tied head is left out, as in the files that `save_pretrained` writes.

  Raises:
    ConfigError: the family cannot express the model.
    CheckpointError: a parameter has another shape than the config says.
  """
  hf, c, table = config_to_huggingface(config, family), config, FAMILIES[family]
  shapes = _shapes(c)
  flat = {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()}
  if flat.keys() != shapes.keys():
    raise CheckpointError(f"the parameters and the config differ at {sorted(flat.keys() ^ shapes.keys())[0]}")
  tensors = {}
  for weight, name, layer, wanted in _expected(table, c, shapes):
    weights = [flat[path] if layer is None else flat[path][layer] for path in weight.ours]
    for path, w in zip(weight.ours, weights, strict=True):
      if w.shape != shapes[path]:
        raise CheckpointError(f"the parameter {path} has shape {w.shape}; the config says {shapes[path]}")
    tensors[name] = np.ascontiguousarray(weight.transform.write(c, weights)).reshape(wanted)
  return hf, tensors


def _shapes(c: ModelConfig) -> dict[str, Shape]:
  """Path -> shape of every parameter, of one layer where they are stacked."""
  flat = traverse_util.flatten_dict(declare(c)[1], sep="/")
  return {path: s.shape[1:] if path.startswith("blocks/") else s.shape for path, s in flat.items()}


def _full_name(name: str, family: Family) -> str:
  return name if name.startswith((family.prefix, family.head.split(".")[0])) else family.prefix + name


def _expected(
  family: Family, c: ModelConfig, shapes: Mapping[str, Shape]
) -> Iterator[tuple[Weight, str, int | None, Shape]]:
  """(table entry, tensor name, layer or None, tensor shape) of all that a checkpoint of this model holds."""
  used = [weight for weight in family.weights if all(path in shapes for path in weight.ours)]
  covered = [path for weight in used for path in weight.ours]
  if sorted(covered) != sorted(shapes):
    raise ConfigError(f"a {family.name} checkpoint has no tensor for {sorted(shapes.keys() - set(covered))}")
  for weight in used:
    blanks = [np.broadcast_to(np.int8(0), shapes[path]) for path in weight.ours]
    wanted = weight.transform.write(c, blanks).shape
    stacked = "{layer}" in weight.theirs
    for layer in range(c.num_layers) if stacked else (None,):
      yield weight, weight.theirs.format(layer=layer), layer, wanted


def _canonical(c: ModelConfig) -> ModelConfig:
  """The same model with every setting that has two spellings, or no effect, in one form."""
  kinds = tuple(c.layer_kinds[i % len(c.layer_kinds)] for i in range(c.num_layers))
  windowed, pattern = "local" in kinds, shortest_period(kinds)
  return dataclasses.replace(
    canonical_rope(c),
    sliding_window=c.sliding_window if windowed else None,
    layer_pattern=pattern if len(pattern) > 1 else (),
    sink_tokens=c.sink_tokens if windowed else 0,
    query_scale=c.head_dim**-0.5 if c.query_scale is None else c.query_scale,
    norm_bias=c.norm_bias or c.norm != "layernorm",
  )

"""Hugging Face checkpoints to parameters and back, by the tables in `families`.

Both directions are mappings of lazy tensors: one is made from the other when it is read, a layer at a time.
"""

import collections
import dataclasses
import fnmatch
import functools
import hashlib
import logging
import re
import string
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError, shown
from jaxllm.interop.families import FAMILIES, READ_AS
from jaxllm.interop.families.class_defaults import CLASS_DEFAULTS, SPELLINGS
from jaxllm.interop.families.keys import Declared, read_keys
from jaxllm.interop.families.rope import canonical_rope
from jaxllm.interop.families.table import (
  DEFAULTS,
  Family,
  Shape,
  Transform,
  Weight,
  activation_name,
  class_of,
  mlp_name,
  read_head,
  shortest_period,
  write_labels,
)
from jaxllm.interop.stored import check_shapes, param_shapes
from jaxllm.interop.tensors import Index, LazyTensor, Tensors, from_parts
from jaxllm.models.config import ModelConfig, MoEConfig

log = logging.getLogger("jaxllm")

# Buffers that old checkpoints hold and that follow from the config.
BUFFERS = (
  "*.rotary_emb.inv_freq",
  "*.attn.bias",
  "*.attn.masked_bias",
  "*.attention.bias",
  "*.attention.masked_bias",
)
# Settings of experts that only training knows, at their defaults.
FOR_TRAINING = {name: getattr(MoEConfig, name) for name in ("capacity_factor", "load_balance_weight", "z_weight")}
OF_CLASS = ("architectures", "id2label", "num_labels")  # keys of the whole, where the model's are in a group
DTYPES = ("float32", "bfloat16", "float16", "float64")


class Place(NamedTuple):
  """Where a checkpoint's tensor stands in our parameters: in those of `weight`, at `at` in their leading axes."""

  weight: Weight
  at: Index
  shape: Shape  # of their tensor


def family_of(config: Mapping[str, Any]) -> Family:
  """The family of a config.json.

  Raises:
    ConfigError: no or an unknown `model_type`.
  """
  name = config.get("model_type")
  name = READ_AS.get(str(name), name)
  if not isinstance(name, str) or name not in FAMILIES:
    known = ", ".join(FAMILIES)
    raise ConfigError(f"config.json has model_type {shown(name)}; those that can be read are {known}")
  return FAMILIES[name]


def config_from_huggingface(config: Mapping[str, Any]) -> ModelConfig:
  """The ModelConfig that a config.json describes.

  Raises:
    ConfigError: an unknown family, a missing key, or a setting that no ModelConfig can express.
  """
  return read_config(config)[0]


def read_config(config: Mapping[str, Any]) -> tuple[ModelConfig, Declared]:
  """The ModelConfig that a config.json describes, and its keys, which know which of them were looked up.

  Raises:
    ConfigError: see `config_from_huggingface`.
  """
  family = family_of(config)
  whole, config = config, config.get(family.text_config, config)
  if not isinstance(config, Mapping):
    raise ConfigError(f"config.json has {family.text_config} = {shown(config)}; it should be a group of keys")
  config = {**config, **{key: whole[key] for key in OF_CLASS if key in whole}}
  defaults = DEFAULTS | dict(family.defaults) | CLASS_DEFAULTS[family.name]
  config = _spelled(config, family, defaults)
  hf = read_keys(config, defaults)
  for key, value in family.requires.items():
    if config.get(key, value) != value:
      raise ConfigError(f"config.json has {key} = {shown(config[key])}; a {family.name} here can only have {value!r}")
  fields = {ours: hf[theirs] for ours, theirs in family.keys.items()}
  fields = {name: value for name, value in fields.items() if value is not None}
  if family.activation:
    fields["mlp"] = mlp_name(hf[family.activation], family.gated)
  c = ModelConfig(**(fields | dict(family.fields) | read_head(hf, family) | family.read(hf)))
  if c.head == "lm" and not c.tie_embeddings and class_of(hf) == family.bare:
    c = dataclasses.replace(c, head="none", head_bias=False)  # else the embedding is its head, as in transformers
  return c, hf


def _spelled(config: Mapping[str, Any], family: Family, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """A config.json with its other spellings as the keys that they mean, over which they go where both stand there."""
  follows = {key: config.get(other, defaults.get(other)) for key, other in family.follows.items()}
  config = dict(config) | {key: value for key, value in follows.items() if config.get(key) is None}
  others = SPELLINGS.get(family.name, {}).items()
  return config | {key: config[other] for other, key in others if config.get(other) is not None}


def config_to_huggingface(config: ModelConfig, family: str) -> dict[str, Any]:
  """The config.json of a model, as the `model_type` `family`.

  Raises:
    ConfigError: the family has no word for something that the model is.
  """
  if family not in FAMILIES:
    raise ConfigError(f"unknown family {family!r}; those that can be written are {', '.join(FAMILIES)}")
  table, c = FAMILIES[family], _canonical(config)
  if table.text_config:
    raise ConfigError(f"a {family} checkpoint holds more than a language model; write it as {family}_text")
  if lacking := [part for part in table.parts if getattr(c, part) is None]:
    raise ConfigError(f"a {family} checkpoint needs a model with model.{lacking[0]}")
  usual = table.bare if c.head == "none" else table.architecture
  hf = {"model_type": family, "architectures": [table.architectures.get(c.head, usual)]}
  hf |= {theirs: getattr(c, ours) for ours, theirs in table.keys.items()}
  hf |= ({table.activation: activation_name(c.mlp)} if table.activation else {}) | table.write(c)
  if class_of(hf) == table.architectures.get(c.head):  # not a class of `others`
    hf |= write_labels(c)
  back = _canonical(config_from_huggingface(hf))
  for field in dataclasses.fields(ModelConfig):
    want, got = (getattr(_untrained(model), field.name) for model in (c, back))
    told_by_tensors = field.name == "head_dense" and c.head == "none" and want is None  # see `_told_by_tensors`
    if want != got and field.name not in ("init", "init_std") and not told_by_tensors:
      raise ConfigError(f"a {family} checkpoint cannot say model.{field.name} = {want!r}; it would say {got!r}")
  return hf


def from_huggingface(config: Mapping[str, Any], tensors: Tensors) -> tuple[ModelConfig, Tensors]:
  """The ModelConfig and the parameters of a checkpoint, of which nothing is read yet.

  Names, shapes and types are checked here, and a tied head against the embedding.

  Args:
    config: the content of config.json.
    tensors: by name, with or without the family's prefix.

  Returns:
    the config, and the parameters by path ("blocks/attention/query/weight") with the shapes that `declare`
    says; a part of a stacked one is read from the one tensor that holds it. They keep their dtype.

  Raises:
    ConfigError: see `config_from_huggingface`.
    CheckpointError: a tensor is missing, unexpected, or of another shape or type; the message names it.
  """
  family, c = family_of(config), config_from_huggingface(config)
  check_count(c, len(tensors))
  given = tensors
  tensors = _named(family, c, given)
  if c.head == "lm" and not config.get("architectures") and _lacks_head(family, c, tensors):
    c = config_from_huggingface({**config, "architectures": [family.bare]})
    tensors = _named(family, c, given)
  c, tensors = _told_by_tensors(family, c, dict(tensors))
  shapes = param_shapes(c)
  sources: dict[str, dict[Index, Callable[[], np.ndarray]]] = {}
  types: dict[str, list[np.dtype]] = {}
  expected = _places(family, c, tensors)
  for name, (weight, index, wanted) in expected.items():
    if name in family.zeros and name not in tensors:
      tensors[name] = LazyTensor(wanted, np.dtype(np.float32), functools.partial(np.zeros, wanted, np.float32))
    if name not in tensors:
      raise CheckpointError(
        f"the checkpoint lacks the tensor {name} (for {', '.join(weight.ours)}){_of_class(family, config)}"
      )
    tensor = tensors[name]
    if tensor.shape != wanted:
      raise CheckpointError(f"the tensor {name} has shape {tensor.shape}; config.json calls for {wanted}")
    if tensor.dtype.name not in DTYPES:
      raise CheckpointError(
        f"the tensor {name} has type {tensor.dtype.name}, so the checkpoint is quantized in a way that cannot "
        f"be read here; use the original one (of {', '.join(DTYPES)})"
      )
    own_shapes = [shapes[path][len(index) :] for path in weight.ours]
    for i, path in enumerate(weight.ours):
      read = functools.partial(_read_piece, weight.transform, c, tensor, own_shapes, i)
      sources.setdefault(path, {})[index] = read
      types.setdefault(path, []).append(tensor.dtype)
  ignored = BUFFERS + tuple(pattern.format(num_layers=c.num_layers) for pattern in family.ignored)
  rest = [n for n in tensors if n not in expected and not any(fnmatch.fnmatch(n, i) for i in ignored)]
  _check_rest(family, c, config, expected, rest)
  return c, {path: _stacked(shapes[path], np.result_type(*types[path]), parts) for path, parts in sources.items()}


def _check_rest(
  family: Family, c: ModelConfig, config: Mapping[str, Any], expected: Mapping[str, Place], rest: Collection[str]
) -> None:
  """Says how many of the tensors without a place stand aside: those of layers beyond the model's, as in files that
  people cut by config.json alone, and what the classes have that a model without a head has not.

  Raises:
    CheckpointError: another one has no place.
  """
  stem = lambda name: name.removeprefix(family.prefix)  # noqa: E731
  layers = {}
  for weight, _, _ in expected.values():
    start, numbered, _ = stem(weight.theirs).partition("{layer}")
    if numbered:
      layers[start] = c.num_encoder_layers if weight.ours[0].startswith("encoder/") else c.num_layers
  parts = {stem(name).partition(".")[0] for name in expected}
  beyond: list[str] = []
  outside: list[str] = []
  wrong: list[str] = []
  for name in rest:
    at = next((start for start in layers if stem(name).startswith(start)), "")
    number = re.match(r"(\d{1,9})\.", stem(name)[len(at) :]) if at else None
    if number and int(number[1]) >= layers[at]:
      beyond.append(name)
    else:
      (outside if c.head == "none" and stem(name).partition(".")[0] not in parts else wrong).append(name)
  if wrong:
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    raise CheckpointError(
      f"the checkpoint has the tensor {wrong[0]}{more}, which this config.json does not call for"
      f"{_of_class(family, config)}"
    )
  if beyond:
    count = c.num_layers
    log.warning("config.json calls for %d layers: %d tensors of later ones stand aside", count, len(beyond))
  if outside:
    named = class_of(config) or family.bare
    log.warning("%d tensors that are no part of a %s stand aside: %s, …", len(outside), shown(named), outside[0])


def check_count(config: ModelConfig, tensors: int) -> None:
  """Raises CheckpointError where a checkpoint has too few tensors for a model's layers and experts; before there are
  names for all of them."""
  experts = config.moe.num_experts * len(config.moe_layers) if config.moe else 0
  if config.num_layers > tensors or experts > 4 * tensors + 4096:  # one tensor can have all experts of a layer
    wanted = f"{config.num_layers} layers" + (f" and {experts} experts" if experts else "")
    raise CheckpointError(f"config.json calls for {wanted} but the checkpoint has {tensors} tensors")


def to_huggingface(config: ModelConfig, family: str, params: Tensors) -> tuple[dict[str, Any], Tensors]:
  """The content of config.json and the tensors by name, each made from its parameters when it is read.

  The inverse of `from_huggingface`. A tied head is left out, as in the files that `save_pretrained` writes.

  Raises:
    ConfigError: the family cannot express the model.
    CheckpointError: a parameter has another shape than the config says.
  """
  hf, c, table = config_to_huggingface(config, family), config, FAMILIES[family]
  check_shapes(c, params, "memory")
  tensors = {}
  for name, (weight, index, wanted) in _places(table, c).items():
    ours = [params[path] for path in weight.ours]
    read = functools.partial(_read_tensor, weight.transform, c, ours, index, wanted)
    tensors[name] = LazyTensor(wanted, np.result_type(*(p.dtype for p in ours)), read)
  if table.own_copies and not c.tie_embeddings:
    copies = {table.named(copy, c.head): table.named(own, c.head) for copy, own in table.copies.items()}
    tensors |= {copy: tensors[own] for copy, own in copies.items() if own in tensors}
  return hf, tensors


def places(config: ModelConfig, family: str, names: Collection[str]) -> tuple[dict[str, Place], dict[str, str]]:
  """Every tensor that a checkpoint of a model holds, by name; and these names as they stand there.

  Args:
    names: of tensors, with or without the family's prefix; those that stand for no tensor come back as they are.

  Raises:
    ConfigError: no such family, or it has no tensor for some parameter.
  """
  table = family_of({"model_type": family})
  full = dict(zip(names, _full_names(table, config, names)))
  return _places(table, config, full.values()), full


def _full_names(family: Family, c: ModelConfig, names: Collection[str]) -> list[str]:
  """These names as the table has them: without old spellings, with the family's prefix or without it."""
  renamed = [_renamed(name, family) for name in names]
  known = set(_places(family, c, {n for name in renamed for n in (name, family.prefix + name)}))
  known |= {family.named(copy, c.head) for copy in family.copies}
  prefix = family.prefixes.get(c.head, family.prefix)

  def variants(name):
    bare = name.removeprefix(family.prefix)
    return name, prefix + name, prefix + bare, bare

  return [next((variant for variant in variants(name) if variant in known), name) for name in renamed]


def _named(family: Family, c: ModelConfig, tensors: Tensors) -> dict[str, LazyTensor]:
  names = _full_names(family, c, tensors)
  if len(set(names)) < len(names):
    twice = next(name for name, count in collections.Counter(names).items() if count > 1)
    raise CheckpointError(f"the checkpoint has the tensor {twice} twice, under two names")
  return dict(zip(names, tensors.values()))


def _of_class(family: Family, config: Mapping[str, Any]) -> str:
  """What to add to an error where the class that config.json names may be the reason."""
  named = class_of(config)
  known = {family.architecture, family.bare, *family.architectures.values(), *family.others}
  return "" if named is None or named in known else f"; config.json is of a {shown(named)}, which is not read here"


def _lacks_head(family: Family, c: ModelConfig, tensors: Tensors) -> bool:
  names = _places(family, c, tensors).items()
  head = [name for name, at in names if at.weight.ours[0].startswith("head/") and name not in family.zeros]
  return bool(head) and not any(name in tensors for name in head)


def _told_by_tensors(
  family: Family, c: ModelConfig, tensors: dict[str, LazyTensor]
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
  """What the file says of a model against its config.json, as transformers takes it: a head unlike the embedding is a
  head of its own, a bare model without a pooler has none. And the tensors, one of those that are copies of each other.

  Raises:
    CheckpointError: the copies differ, and the family has a place for one only.
  """
  if c.head == "none" and c.head_dense is not None:
    names = _places(family, c, tensors).items()
    if not any(name in tensors for name, at in names if at.weight.ours[0].startswith("head/dense")):
      log.warning("the file has no pooler: the state of the first token stands for a text")
      c = dataclasses.replace(c, head_dense=None)
  copies = {family.named(copy, c.head): family.named(own, c.head) for copy, own in family.copies.items()}
  if c.head == "lm" and c.tie_embeddings:
    copies[family.head] = next(w.theirs for w in family.weights if w.ours == ("embedding/tokens",))
  for copy, own in copies.items():
    if copy not in tensors:
      continue
    both = own in tensors
    tensor = tensors.pop(copy)
    if not both or (copy.endswith(".bias") and _digest(tensor.read()) != _digest(tensors[own].read())):
      tensors[own] = tensor  # of two biases that is added which the head has
    elif _digest(tensor.read()) != _digest(tensors[own].read()):
      if copy != family.head or "tie_embeddings" not in family.keys:
        raise CheckpointError(f"the tensor {copy} differs from {own}, and a {family.name} here has one for both")
      log.warning(
        "config.json ties the embeddings, but %s differs from them: it is used as it stands in the file (set "
        "tie_word_embeddings to false to say so)",
        copy,
      )
      c, tensors[copy] = dataclasses.replace(c, tie_embeddings=False), tensor
  return c, tensors


def _renamed(name: str, family: Family) -> str:
  start = next((start for start in family.renamed if name.startswith(start)), "")
  name = family.renamed[start] + name.removeprefix(start) if start else name
  # as the first BERTs, which came from TensorFlow
  return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _table(family: Family, c: ModelConfig, names: Collection[str] = ()) -> tuple[Weight, ...]:
  """The family's table, with those of its other names that a checkpoint with these names goes by."""
  first = c.moe_layers[0] if c.moe else 0
  first_name = lambda w: w.theirs.format(layer=first)  # noqa: E731
  others = tuple(w for w in family.other_names if {first_name(w), first_name(w).removeprefix(family.prefix)} & {*names})
  replaced = {path for weight in others for path in weight.ours}
  table = family.weights + family.more_weights(c)
  return tuple(w for w in table if replaced.isdisjoint(w.ours)) + others


def _places(family: Family, c: ModelConfig, names: Collection[str] = ()) -> dict[str, Place]:
  """Every tensor that a checkpoint holds, by name; of the spellings that a family knows the one of these `names`.

  The placeholders in a name stand for our leading axes, in their order: "{layer}" for the layers that have
  the parameter, "{expert}" for the experts.
  """
  shapes, found = param_shapes(c), dict[str, Place]()
  used = [weight for weight in _table(family, c, names) if all(path in shapes for path in weight.ours)]
  covered = [path for weight in used for path in weight.ours]
  if sorted(covered) != sorted(shapes):
    raise ConfigError(f"a {family.name} checkpoint has no tensor for {sorted(shapes.keys() - set(covered))}")
  for weight in used:
    axes = [name for _, name, _, _ in string.Formatter().parse(weight.theirs) if name]
    blanks = [np.broadcast_to(np.int8(0), shapes[path][len(axes) :]) for path in weight.ours]
    wanted = weight.transform.write(c, blanks).shape
    for index in np.ndindex(shapes[weight.ours[0]][: len(axes)]):
      if axes and index[0] < weight.first_layer:
        continue
      numbers = dict(zip(axes, index))
      if c.moe and "layer" in numbers:
        numbers["layer"] = c.layers_with(weight.ours[0].split("/")[1])[index[0]]
      name = weight.theirs.format(**numbers)
      found[family.named(name, c.head)] = Place(weight, index, wanted)
  return found


def _read_piece(transform: Transform, c: ModelConfig, tensor: LazyTensor, ours: list[Shape], i: int) -> np.ndarray:
  return transform.read(c, tensor.read(), ours)[i]


def _read_tensor(
  transform: Transform, c: ModelConfig, ours: list[LazyTensor], index: Index, wanted: Shape
) -> np.ndarray:
  return np.ascontiguousarray(transform.write(c, [param.part(index) for param in ours])).reshape(wanted)


def _stacked(shape: Shape, dtype: np.dtype, parts: Mapping[Index, Callable[[], np.ndarray]]) -> LazyTensor:
  axes = len(next(iter(parts)))
  unused = functools.partial(np.ones, shape[axes:], dtype)  # see `Weight.first_layer`
  return from_parts(shape, dtype, axes, lambda index: parts.get(index, unused)())


def _digest(x: np.ndarray) -> bytes:
  return hashlib.sha256(np.ascontiguousarray(x).view(np.uint8)).digest()


def _untrained(c: ModelConfig) -> ModelConfig:
  """The same model without what only its training knows."""
  return dataclasses.replace(c, moe=c.moe and dataclasses.replace(c.moe, **FOR_TRAINING))


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
    mlp_dim=c.mlp_dim if c.layers_with("mlp") else c.moe.mlp_dim,
    mla=c.mla and dataclasses.replace(c.mla, norm_eps=c.mla.norm_eps or c.norm_eps),
    tie_embeddings=c.tie_embeddings and (c.head != "none" or c.architecture == "encoder"),
  )

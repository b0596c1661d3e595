"""The files by which sentence-transformers makes vectors of a model's hidden states (Sentence-BERT, arXiv 1908.10084).

modules.json lists what follows the transformer, each with a folder of its own (Pooling, Dense, Normalize);
sentence_bert_config.json says how texts are cut and config_sentence_transformers.json what is put before them.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
from jaxtyping import Float32

from jaxllm.base.errors import CheckpointError, ConfigError, shown
from jaxllm.base.files import regular
from jaxllm.base.os_errors import file_errors
from jaxllm.base.strangers import Size, declared, parse_json, read_json
from jaxllm.interop.safetensors import read_sharded

MODULES = "modules.json"
SETTINGS, TEXTS = "config_sentence_transformers.json", "sentence_bert_config.json"
READ_IF_THERE = (MODULES, SETTINGS, TEXTS, "*/config.json", "*/model.safetensors*", "*/pytorch_model.bin*")
# Its names of the ways to make one vector of many, in the order in which it puts several of them side by side.
POOLINGS = {"cls": "first", "max": "max", "mean": "mean"}
POOLINGS |= {"mean_sqrt_len_tokens": "mean_sqrt", "weightedmean": "weighted_mean", "lasttoken": "last"}
_OLDER = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_ACTIVATIONS = {
  "torch.nn.modules.activation.Tanh": np.tanh,
  "torch.nn.modules.linear.Identity": lambda x: x,
  "torch.nn.modules.activation.ReLU": lambda x: np.maximum(x, 0),
  "torch.nn.modules.activation.Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
Vectors = Float32[np.ndarray, "B D"]


class _Module(TypedDict, total=False):
  """An entry of modules.json."""

  type: Required[str]
  path: Required[str]


class _Modules(TypedDict):
  modules: list[_Module]


class _Texts(TypedDict, total=False):
  """sentence_bert_config.json."""

  max_seq_length: Size | None
  do_lower_case: bool | None


class _Settings(TypedDict, total=False):
  """config_sentence_transformers.json."""

  prompts: dict[str, str] | None
  default_prompt_name: str | None
  truncate_dim: Size | None


class _Pooling(TypedDict, total=False):
  """1_Pooling/config.json, without the names that have a flag each."""

  pooling_mode: str | list[str]
  include_prompt: bool


class _Dense(TypedDict, total=False):
  """2_Dense/config.json."""

  in_features: Required[Size]
  out_features: Required[Size]
  bias: bool
  activation_function: str
  use_residual: bool


@dataclasses.dataclass(frozen=True)
class Dense:
  """A matrix, and what follows it, on a text's vector."""

  weight: Float32[np.ndarray, "out in"]
  bias: Float32[np.ndarray, " out"] | None
  activation: str

  def __call__(self, vectors: Vectors) -> Vectors:
    """The new vectors.

    Raises:
      CheckpointError: these have not as many numbers as it takes.
    """
    if vectors.shape[-1] != self.weight.shape[1]:
      raise CheckpointError(f"a Dense takes vectors of {self.weight.shape[1]} numbers; these have {vectors.shape[-1]}")
    out = vectors @ self.weight.T + (0 if self.bias is None else self.bias)
    return _ACTIVATIONS[self.activation](out).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TextVectors:
  """How a model's states become one vector of a text.

  Attributes:
    pooling: of `jaxllm.inference.encode.POOLINGS`, the vectors of several side by side.
    steps: what is done to the vector then; None: it is scaled to length 1.
    count_prompt: the prompt's tokens take part in the pooling.
    prompts: what stands before a text, by purpose; the `default` one where none is named.
    size: so many numbers of a vector are kept; None: all.
    max_tokens: texts are cut to these, special tokens included. lower: texts are in small letters first.
    files: all this as it was found, by path.
  """

  pooling: tuple[str, ...] = ("mean",)
  steps: tuple[Dense | None, ...] = ()
  count_prompt: bool = True
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  default: str | None = None
  size: int | None = None
  max_tokens: int | None = None
  lower: bool = False
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

  def prompt(self, name: str | None) -> str:
    """The text to put before each.

    Raises:
      ConfigError: there is none of this name.
    """
    name = self.default if name is None else name
    if name is None:
      return ""
    if name not in self.prompts:
      there = ", ".join(sorted(self.prompts)) or "none"
      raise ConfigError(f"the model has no prompt {shown(name)} for texts; it has {there}")
    return self.prompts[name]

  def finish(self, vectors: Vectors, normalize: bool | None = None) -> Vectors:
    """The vectors after `steps`; `normalize`: they are, or are not, scaled to length 1, whatever the steps say."""
    for step in self.steps:
      if step is not None:
        vectors = step(vectors)
      elif normalize is not False:
        vectors = unit(vectors)
    vectors = vectors[:, : self.size]
    return unit(vectors) if normalize else vectors

  def save(self, directory: Path) -> None:
    """Writes the files as they were found."""
    for name, data in self.files.items():
      (directory / name).parent.mkdir(parents=True, exist_ok=True)
      (directory / name).write_bytes(data)


def unit(vectors: Vectors) -> Vectors:
  """Scaled to length 1."""
  return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def read_text_vectors(directory: Path) -> TextVectors | None:
  """What a directory says of a text's vector; None where it has no modules.json.

  Raises:
    CheckpointError: a file is missing or damaged. ConfigError: it asks for what is not known here.
  """
  if not (directory / MODULES).is_file():
    return None
  files = {name: _bytes(directory / name) for name in (MODULES, SETTINGS, TEXTS) if (directory / name).is_file()}
  entries = declared(_Modules, {"modules": parse_json(files[MODULES], MODULES)}, MODULES, CheckpointError)["modules"]
  found: dict[str, Any] = {}
  steps: list[Dense | None] = []
  for number, entry in enumerate(entries):
    kind, folder = entry["type"].rpartition(".")[2], _inside(directory, entry["path"])
    if number == 0 and kind == "Transformer" and folder == directory:
      continue
    if kind == "Pooling" and number == 1:
      found = _pooling(folder / "config.json")
    elif kind == "Dense" and found:
      steps.append(_dense(folder))
    elif kind == "Normalize" and found:
      steps.append(None)
    else:
      raise ConfigError(
        f"{directory / MODULES}: module {number} is {shown(entry['type'])} in {shown(entry['path'])}; known are a "
        "Transformer in the directory itself, then Pooling, then Dense and Normalize"
      )
    parts = sorted(folder.iterdir()) if folder.is_dir() else []
    files |= {part.relative_to(directory).as_posix(): _bytes(part) for part in parts if part.is_file()}
  texts: Any = declared(_Texts, _object(directory / TEXTS), str(directory / TEXTS), CheckpointError)
  settings: Any = declared(_Settings, _object(directory / SETTINGS), str(directory / SETTINGS), CheckpointError)
  prompts = {"query": "", "document": ""} | (settings.get("prompts") or {})  # which every model has
  default = settings.get("default_prompt_name")
  if default is not None and default not in prompts:
    raise ConfigError(f"{directory / SETTINGS}: default_prompt_name is {shown(default)}, which no prompt has")
  return TextVectors(
    **found,
    steps=tuple(steps),
    prompts=prompts,
    default=default,
    size=settings.get("truncate_dim"),
    max_tokens=texts.get("max_seq_length"),
    lower=bool(texts.get("do_lower_case")),
    files=files,
  )


def _inside(directory: Path, path: str) -> Path:
  folder = directory / path
  if "\0" in path or not folder.resolve().is_relative_to(directory.resolve()):
    raise CheckpointError(f"{directory / MODULES}: the path {shown(path)} leads out of the model's directory")
  return folder


def _bytes(path: Path) -> bytes:
  with file_errors(path):
    return regular(path).read_bytes()


def _object(path: Path) -> dict[str, Any]:
  return read_json(path) if path.is_file() else {}


def _pooling(path: Path) -> dict[str, Any]:
  values = read_json(path)
  known: Any = declared(_Pooling, values, str(path), CheckpointError)
  flags = [name for name, key in zip(POOLINGS, _OLDER) if values.get(f"pooling_mode_{key}")]
  modes = known.get("pooling_mode", flags or ["mean"])
  modes = [modes] if isinstance(modes, str) else modes
  if unknown := [mode for mode in modes if mode not in POOLINGS]:
    raise ConfigError(f"{path}: pooling_mode is {shown(unknown[0])}; known are {', '.join(POOLINGS)}")
  return {"pooling": tuple(POOLINGS[mode] for mode in modes), "count_prompt": known.get("include_prompt", True)}


def _dense(folder: Path) -> Dense:
  path = folder / "config.json"
  known: Any = declared(_Dense, read_json(path), str(path), CheckpointError)
  activation = known.get("activation_function", "torch.nn.modules.activation.Tanh")
  if activation not in _ACTIVATIONS or known.get("use_residual"):
    said = "use_residual" if known.get("use_residual") else f"the activation {shown(activation)}"
    raise ConfigError(f"{path}: {said} is not known; known are {', '.join(_ACTIVATIONS)}")
  tensors = {name: np.asarray(tensor.read(), np.float32) for name, tensor in read_sharded(folder).items()}
  shape = (known["out_features"], known["in_features"])
  wanted = {"linear.weight": shape} | ({"linear.bias": shape[:1]} if known.get("bias", True) else {})
  if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
    raise CheckpointError(f"{folder}: its tensors are not those of {path.name}, {wanted}")
  return Dense(tensors["linear.weight"], tensors.get("linear.bias"), activation)

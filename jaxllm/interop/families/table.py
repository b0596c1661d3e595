"""What a family declares, and the pieces that families share.

A family is a `Family`: how config.json corresponds to `ModelConfig`, and one table of weight names that
serves both directions. A new family is one file with such a value, listed in `families/__init__.py`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import ConfigError, shown
from jaxllm.models.config import ACTIVATIONS, GATED, MLPS, ModelConfig
from jaxllm.models.parts import MAX_LAYERS

Shape = tuple[int, ...]
# ModelConfig field -> key, as most families spell them
KEYS = {
  "vocab_size": "vocab_size",
  "embed_dim": "hidden_size",
  "num_layers": "num_hidden_layers",
  "num_heads": "num_attention_heads",
  "mlp_dim": "intermediate_size",
  "max_seq_len": "max_position_embeddings",
  "init_std": "initializer_range",
  "tie_embeddings": "tie_word_embeddings",
}
BIASES = {"attention_out_bias": "attention_bias", "attention_bias": "attention_bias"}  # one key says both
ALL_BIASES = ("attention_bias", "attention_out_bias", "mlp_bias")
# Of absent keys, where a family's own defaults do not say otherwise
DEFAULTS = {"initializer_range": 0.02}
# LayerNorm, and biases everywhere
BIASED = {"norm": "layernorm"} | dict.fromkeys(ALL_BIASES, True)
QKV = ("blocks/attention/query", "blocks/attention/key", "blocks/attention/value")
GATE_UP = ("blocks/mlp/gate", "blocks/mlp/up")


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one of their tensors holds our weights (of one layer): both directions.

  read: (config, tensor, shapes of our weights) -> our weights. write: (config, our weights) -> tensor.
  """

  read: Callable[[ModelConfig, np.ndarray, list[Shape]], list[np.ndarray]]
  write: Callable[[ModelConfig, list[np.ndarray]], np.ndarray]


def transposed(x):
  """Matrices [..., I, O] as [..., O, I]; a bias as it is."""
  return x if x.ndim < 2 else np.swapaxes(x, -1, -2)


def _columns(c, x, shapes):
  return np.split(x, np.cumsum([shape[-1] for shape in shapes])[:-1], axis=-1)


def _from_groups(c, x, shapes):
  # [..., K, G + 2, H]: each key/value head after the query heads that read it
  groups = x.T.reshape(*x.T.shape[:-1], c.num_kv_heads, -1, c.head_dim)
  parts = groups[..., :-2, :], groups[..., -2:-1, :], groups[..., -1:, :]
  return [part.reshape(*x.T.shape[:-1], -1) for part in parts]


def _to_groups(c, weights):
  heads = [w.reshape(*w.shape[:-1], c.num_kv_heads, -1, c.head_dim) for w in weights]
  return np.concatenate(heads, axis=-2).reshape(*weights[0].shape[:-1], -1).T


SAME = Transform(lambda c, x, shapes: [x], lambda c, weights: weights[0])
# torch.nn.Linear holds [outputs, inputs]
TRANSPOSED = Transform(lambda c, x, shapes: [transposed(x)], lambda c, weights: transposed(weights[0]))
# several matrices [inputs, outputs] side by side (GPT-2's Conv1D)
COLUMNS = Transform(_columns, lambda c, weights: np.concatenate(weights, axis=-1))
# the same of torch.nn.Linear (Phi-3), or of a stack of them (experts)
ROWS = Transform(
  lambda c, x, shapes: _columns(c, transposed(x), shapes),
  lambda c, weights: transposed(np.concatenate(weights, axis=-1)),
)
# query, key and value interleaved by key/value head (GPT-NeoX, BLOOM, Falcon)
BY_HEAD = Transform(_from_groups, _to_groups)


@dataclasses.dataclass(frozen=True)
class Weight:
  """One of their tensors; "{layer}" and "{expert}" in its name stand for the leading axes of our weights."""

  ours: tuple[str, ...]
  theirs: str
  transform: Transform = SAME
  first_layer: int = 0  # layers before it lack the tensor; our weights of them are unused, and 1


def linear(ours: str | tuple[str, ...], theirs: str, transform: Transform = TRANSPOSED) -> tuple[Weight, ...]:
  """The matrix and the bias of a projection, or of several fused into one tensor."""
  paths = (ours,) if isinstance(ours, str) else ours
  return (
    Weight(tuple(f"{path}/weight" for path in paths), f"{theirs}.weight", transform),
    Weight(tuple(f"{path}/bias" for path in paths), f"{theirs}.bias", transform),
  )


def linears(ours: str, theirs: str, **names: str) -> tuple[Weight, ...]:
  """Several projections of one part of the block: our name of each, and theirs."""
  return sum((linear(f"{ours}/{name}", f"{theirs}.{their}") for name, their in names.items()), ())


def norm(ours: str, theirs: str) -> tuple[Weight, ...]:
  """The scale and the bias of a norm."""
  return Weight((f"{ours}/scale",), f"{theirs}.weight"), Weight((f"{ours}/bias",), f"{theirs}.bias")


def embedding(ours: str, theirs: str) -> Weight:
  return Weight((ours,), f"{theirs}.weight")


def _nothing(_) -> dict[str, Any]:
  return {}


@dataclasses.dataclass(frozen=True)
class Family:
  """A Hugging Face architecture.

  The table of weights may name more than a config has (biases, an untied head): what `ModelConfig` does
  not declare is not expected. What it declares must be in the table once.
  """

  name: str  # `model_type` in config.json
  architecture: str  # in `architectures`: the class with the language-modelling head
  keys: Mapping[str, str]  # ModelConfig field -> the key that means the same
  weights: tuple[Weight, ...]
  activation: str | None = "hidden_act"  # the key of the feed-forward's; None: `fields` or `read` have it
  gated: bool = True  # the feed-forward is
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that no key says
  # Those of a head, by `ModelConfig.head`; a value that is a key of config.json stands for what is said there.
  by_head: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of keys that `CLASS_DEFAULTS` has not
  requires: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys with one value we know
  # Keys that where absent are as others are before these are said again in another spelling, see `CLASS_DEFAULTS`
  follows: Mapping[str, str] = dataclasses.field(default_factory=dict)
  parts: tuple[str, ...] = ()  # ModelConfig fields that may be None but not in this family
  read: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing  # config.json -> further fields
  write: Callable[[ModelConfig], dict[str, Any]] = _nothing  # and back
  other_names: tuple[Weight, ...] = ()  # read in place of entries of `weights`, where a checkpoint has them
  text_config: str | None = None  # the key of the settings, where config.json has several models'; read only
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)  # starts of names, read as if they were others
  prefix: str = "model."  # of every tensor but the head
  # In files of other classes it is another: `ModelConfig.head` -> prefix
  prefixes: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"none": ""})
  head: str = "lm_head.weight"
  # The classes of other heads, by `ModelConfig.head`
  architectures: Mapping[str, str] = dataclasses.field(default_factory=dict)
  others: tuple[str, ...] = ()  # classes that `read` knows beside them
  labels: int = 2  # of a classifier, where nothing says it
  more_weights: Callable[[ModelConfig], tuple[Weight, ...]] = lambda c: ()  # that hang on the config
  # Their tensors that are another one in transformers, the other: a file may have either, or both.
  copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
  own_copies: bool = False  # ... but where the embeddings are not tied, and transformers looks for all of them
  zeros: tuple[str, ...] = ()  # tensors that are zeros where a checkpoint lacks them
  # Patterns of tensors that a checkpoint may hold and the model has no use for; "{num_layers}" is known.
  ignored: tuple[str, ...] = ()

  @property
  def bare(self) -> str:
    """The class without a head, whose files have no head and no prefix."""
    usual = re.sub("(ForCausalLM|LMHeadModel|ForConditionalGeneration|ForMaskedLM)$", "Model", self.architecture)
    return self.architectures.get("none", usual)

  def named(self, name: str, head: str) -> str:
    """A tensor's name in the files of the class with this head."""
    if not name.startswith(self.prefix):
      return name
    return self.prefixes.get(head, self.prefix) + name.removeprefix(self.prefix)


def read_part(cls: type, hf: Mapping[str, Any], keys: Mapping[str, str], **more: Any) -> Any:
  """A part of a ModelConfig (experts, latent attention) by the keys that mean its fields."""
  return cls(**{ours: hf[theirs] for ours, theirs in keys.items()}, **more)


def write_part(part: Any, keys: Mapping[str, str]) -> dict[str, Any]:
  """The inverse of `read_part`."""
  return {theirs: getattr(part, ours) for ours, theirs in keys.items()}


def class_of(hf: Mapping[str, Any]) -> str | None:
  """The class that config.json names."""
  return (hf.get("architectures") or [None])[0]


def read_head(hf: Mapping[str, Any], family: Family) -> dict[str, Any]:
  """The fields of the head by the class that config.json names; of "lm" where that is of none in `by_head`."""
  head = next((head for head in family.by_head if family.architectures.get(head) == class_of(hf) is not None), "lm")
  said = family.by_head.get(head, {}).items()
  fields = {ours: hf[value] if value in hf else value for ours, value in said}  # noqa: SIM401 (`get` is of keys only)
  if fields.get("head_dense"):
    fields["head_dense"] = mlp_name(fields["head_dense"], gated=False)
  if head in ("sequence", "token", "span"):
    labels = hf.get("num_labels", len(hf.get("id2label") or range(family.labels)))
    fields["num_labels"] = 2 if head == "span" else labels
  return fields | {"head": head}


def classes(name: str, *heads: str) -> dict[str, str]:
  """The classes of these heads, whose names begin with `name`; of none: of all that encoders have."""
  stems = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "span": "ForQuestionAnswering"}
  return {head: name + stem for head, stem in (stems | {"none": "Model"}).items() if not heads or head in heads}


def encoder_heads(**dense: str) -> dict[str, dict[str, Any]]:
  """`Family.by_head` of an encoder: a norm before a language model's, a bias but for the bare model's.

  Args:
    dense: the activation before a head, or the key that says it.
  """
  return {
    head: {"head_dense": dense.get(head), "head_norm": head == "lm", "head_bias": head != "none"}
    for head in ("lm", "sequence", "token", "span", "none")
  }


def write_labels(c: ModelConfig) -> dict[str, Any]:
  """The numbered labels of a classifier."""
  if c.head not in ("sequence", "token"):
    return {}
  names = [f"LABEL_{i}" for i in range(c.num_labels)]
  return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


# Names of transformers -> ours: the same, but for GELU's approximation and for names that mean what another one does.
_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
_ACTIVATIONS = {name: name for name in ACTIVATIONS if name != "gelu_tanh"} | dict.fromkeys(_TANH, "gelu_tanh")
_ACTIVATIONS |= {"swish": "silu", "gelu_python": "gelu"}


def mlp_name(activation: str, gated: bool) -> str:
  """`ModelConfig.mlp` of a Hugging Face activation name."""
  if activation not in _ACTIVATIONS:
    raise ConfigError(f"config.json has the activation {shown(activation)}; those known are {', '.join(_ACTIVATIONS)}")
  return GATED[_ACTIVATIONS[activation]] if gated else _ACTIVATIONS[activation]


def activation_name(mlp: str) -> str:
  """The Hugging Face activation name of a `ModelConfig.mlp`. Raises ConfigError where there is none."""
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  if mlp not in MLPS or MLPS[mlp][0] not in names:
    raise ConfigError(f"no config.json of this family can say model.mlp = {mlp!r}")
  return names[MLPS[mlp][0]]


def pattern_from_types(layer_types: list[str]) -> tuple[str, ...]:
  """The shortest `layer_pattern` that repeats into these `layer_types`."""
  kinds = {"full_attention": "global", "sliding_attention": "local"}
  for kind in layer_types:
    if kind not in kinds:
      raise ConfigError(f"config.json has a layer of type {shown(kind)}; those known are {', '.join(kinds)}")
  return shortest_period(tuple(kinds[kind] for kind in layer_types))


def layer_types(hf: Mapping[str, Any], is_local: Callable[[int], Any]) -> list[str]:
  """`layer_types`, and what a file without them means."""
  layers = range(hf["num_hidden_layers"])
  return hf.get("layer_types") or ["sliding_attention" if is_local(i) else "full_attention" for i in layers]


def read_windows(layer_types: list[str], window: int) -> dict[str, Any]:
  """`sliding_window` and `layer_pattern` of these layers; nothing where none of them is local."""
  pattern = pattern_from_types(layer_types)
  if "local" not in pattern:
    return {}
  return {"sliding_window": window, "layer_pattern": pattern if len(pattern) > 1 else ()}


def shortest_period(layers: tuple[str, ...]) -> tuple[str, ...]:
  """The shortest start of `layers` that repeats into it. Raises ConfigError for more layers than a model can have."""
  if len(layers) > MAX_LAYERS:
    raise ConfigError(f"config.json has kinds of {len(layers)} layers; a model has at most {MAX_LAYERS}")
  periods = range(1, len(layers) + 1)
  return next(layers[:p] for p in periods if all(k == layers[i % p] for i, k in enumerate(layers)))


def types_from_pattern(c: ModelConfig) -> list[str]:
  """`layer_types`: one entry a layer."""
  names = {"global": "full_attention", "nope": "full_attention", "local": "sliding_attention"}
  return [names[c.layer_kinds[i % len(c.layer_kinds)]] for i in range(c.num_layers)]

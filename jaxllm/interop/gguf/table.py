"""What GGUF says of an architecture: its names for what a Hugging Face family's table has, and what is said nowhere.

Sources: llama.cpp's conversion/*.py (what is written) and src/models/*.cpp (what is read).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.gguf.header import entry
from jaxllm.interop.tensors import Tensors
from jaxllm.models.config import ModelConfig

# Metadata behind "<architecture>." -> the ModelConfig field that it says, where the family has a key for that
FIELDS = {
  "context_length": "max_seq_len",
  "embedding_length": "embed_dim",
  "block_count": "num_layers",
  "feed_forward_length": "mlp_dim",
  "attention.head_count": "num_heads",
  "attention.head_count_kv": "num_kv_heads",
  "attention.key_length": "head_dim",
  "attention.value_length": "head_dim",
  "attention.layer_norm_rms_epsilon": "norm_eps",
  "logit_scale": "logit_scale",
}
# Our parameters -> tensor names, of a matrix or a norm without ".weight" or ".bias"; "{}" is the layer.
TENSORS = {
  "embedding/tokens": "token_embd.weight",
  "embedding/positions": "position_embd.weight",
  "embedding/token_types": "token_types.weight",
  "embedding/norm": "token_embd_norm",
  "final_norm": "output_norm",
  "head": "output",
  "blocks/attention/query": "blk.{}.attn_q",
  "blocks/attention/key": "blk.{}.attn_k",
  "blocks/attention/value": "blk.{}.attn_v",
  "blocks/attention": "blk.{}.attn_qkv",  # all three in one
  "blocks/attention/output": "blk.{}.attn_output",
  "blocks/attention/query_norm": "blk.{}.attn_q_norm",
  "blocks/attention/key_norm": "blk.{}.attn_k_norm",
  "blocks/attention/sinks": "blk.{}.attn_sinks.weight",
  "blocks/attention_norm": "blk.{}.attn_norm",
  "blocks/attention_post_norm": "blk.{}.post_attention_norm",
  "blocks/mlp/gate": "blk.{}.ffn_gate",
  "blocks/mlp/up": "blk.{}.ffn_up",
  "blocks/mlp/down": "blk.{}.ffn_down",
  "blocks/moe/router": "blk.{}.ffn_gate_inp",
  "blocks/moe/correction_bias": "blk.{}.exp_probs_b.bias",
  "blocks/moe/gate": "blk.{}.ffn_gate_exps",  # of all experts
  "blocks/moe/up": "blk.{}.ffn_up_exps",
  "blocks/moe/down": "blk.{}.ffn_down_exps",
  "blocks/moe/shared/gate": "blk.{}.ffn_gate_shexp",
  "blocks/moe/shared/up": "blk.{}.ffn_up_shexp",
  "blocks/moe/shared/down": "blk.{}.ffn_down_shexp",
  "blocks/mlp_norm": "blk.{}.ffn_norm",
  "blocks/mlp_post_norm": "blk.{}.post_ffw_norm",
}
SHARED = {
  "blocks/attention/query": "blocks/attention",
  "blocks/mlp/gate": "blocks/mlp/up",
}  # the first of several in one


@dataclasses.dataclass(frozen=True)
class Split:
  """How a tensor of Hugging Face's that holds several of our weights becomes a tensor for each of them, and back."""

  split: Callable[[ModelConfig, np.ndarray], list[np.ndarray]]
  join: Callable[[ModelConfig, list[np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Architecture:
  name: str  # general.architecture
  model_type: str  # of the Hugging Face family
  optional: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further keys, absent where unset
  fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # in place of those of FIELDS
  interleaved: bool = False  # query and key rows are permuted for llama.cpp's rotation of neighbouring pairs
  norm_offset: bool = False  # norm scales are 1 + the checkpoint's
  transposed: str = "(?!)"  # of our weights those that Hugging Face keeps [inputs, outputs]
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys of config.json of which it knows one value
  read: Callable[["Metadata"], dict[str, Any]] = lambda m: {}  # what only the architecture implies
  write: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}  # further metadata
  rope: bool = True
  by_head: bool = False  # query, key and value take turns by key head in Hugging Face's one tensor, not in GGUF's
  windowless: bool = False  # llama.cpp has no window where the family can have one
  activation: str | None = None  # the key of an activation, of which llama.cpp has not all, and GELU's approximation
  activations: tuple[str, ...] = ("gelu", "gelu_tanh")  # that it has
  stems: Callable[[ModelConfig], Mapping[str, str]] = lambda c: {}  # in place of those of TENSORS
  splits: Mapping[str, Split] = dataclasses.field(default_factory=dict)  # by the first of the weights
  joined: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the same in older files, which do not split it
  blocks: str = "blk."  # begins the names of the layers that "block_count" counts
  latent: bool = False  # attention is (DeepSeek)
  factors: bool = False  # llama.cpp reads divisors of RoPE's frequencies

  @functools.cached_property
  def keys(self) -> dict[str, str]:
    """Metadata -> config.json."""
    theirs, layernorm = FAMILIES[self.model_type].keys, FAMILIES[self.model_type].fields.get("norm") == "layernorm"
    named = {key.replace("rms_", "") if layernorm else key: field for key, field in (FIELDS | self.fields).items()}
    return {key: theirs[field] for key, field in named.items() if field in theirs}

  def tensor_names(self, c: ModelConfig, ours: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors, "{}" for the layer, that hold what Hugging Face has in one: these of our weights, by path.

    Empty: there is no place for it.
    """
    stems = {**TENSORS, **self.stems(c)}

    def name(path: str) -> str:
      stem, _, kind = path.rpartition("/")
      return stems.get(path) or (f"{stems[stem]}.{'bias' if kind == 'bias' else 'weight'}" if stem in stems else "")

    if len(ours) > 1 and ours[0] not in self.splits:
      stem, _, kind = ours[0].rpartition("/")
      ours = (f"{SHARED[stem]}/{kind}",)
    names = tuple(map(name, ours))
    return names if all(names) else ()


class Metadata:
  """Checked look-ups under an architecture's prefix; `tensors` are those of the file, `heeded` what was looked up."""

  def __init__(self, entries: Mapping[str, Any], architecture: str, tensors: Tensors):
    self.entries, self.prefix, self.tensors = entries, architecture, tensors
    self.heeded: set[str] = set()

  def _key(self, key: str) -> str:
    self.heeded.add(key)
    return f"{self.prefix}.{key}"

  def number(self, key: str, default: float | None = None) -> Any:
    """A number, `default` where there is none; what is said layer by layer must be the same in all of them."""
    value = self.entries.get(self._key(key), default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
      value = value[0].item()
    if value is None:
      return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 31:
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} is {value!r}")
    return value

  def flag(self, key: str, default: bool) -> bool:
    return entry(self.entries, self._key(key), bool, default)

  def text(self, key: str) -> str | None:
    return entry(self.entries, self._key(key), str)

  def texts(self, key: str) -> list[str]:
    return entry(self.entries, self._key(key), list, [])

  @property
  def head_width(self) -> int:
    return self.number("attention.key_length") or self.positive("embedding_length") // self.positive(
      "attention.head_count"
    )

  def positive(self, key: str) -> Any:
    """A number that must be there; whole, unless it is a norm's epsilon or a scale."""
    value = self.number(key)
    if value is None:
      raise CheckpointError(f"the GGUF file lacks the metadata {self.prefix}.{key}")
    if not value or not (isinstance(value, int) or key.endswith(("epsilon", "scale"))):
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} is {value!r}")
    return value

  def pattern(self, period: int) -> list[str]:
    """layer_types: every `period`-th layer sees everything, unless the file says it layer by layer."""
    key, layers = "attention.sliding_window_pattern", self.positive("block_count")
    local = self.entries.get(self._key(key))
    if not isinstance(local, np.ndarray):
      period = int(self.number(key, period))
      local = [period == 0 or i % period < period - 1 for i in range(layers)]
    if len(local) != layers:
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} has {len(local)} entries for {layers} layers")
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]

"""GGUF's architectures as Hugging Face's: config.json and tensor names, in both directions.

What llama.cpp assumes without saying so (activations, scales, patterns) is what `read_config` leaves to the
family's own table; `write_config` reads its result back, so that a model of which GGUF would tell another
story is refused. Sources: llama.cpp's conversion/*.py (what is written) and src/models/*.cpp (what is read).
"""

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.gguf.header import entry
from jaxllm.interop.gguf.rope import llama3_factors, read_rope, write_rope
from jaxllm.interop.huggingface import BUFFERS, config_from_huggingface, config_to_huggingface
from jaxllm.interop.tensors import LazyTensor, Tensors, in_memory

# Metadata behind "<architecture>." -> the ModelConfig field that it says
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
}
# Our parameters -> tensor names without ".weight" or ".bias"; "{}" is the layer.
TENSORS = {
  "embedding/tokens": "token_embd",
  "embedding/positions": "position_embd",
  "final_norm": "output_norm",
  "head": "output",
  "blocks/attention/query": "blk.{}.attn_q",
  "blocks/attention/key": "blk.{}.attn_k",
  "blocks/attention/value": "blk.{}.attn_v",
  "blocks/attention": "blk.{}.attn_qkv",  # all three in one
  "blocks/attention/output": "blk.{}.attn_output",
  "blocks/attention/query_norm": "blk.{}.attn_q_norm",
  "blocks/attention/key_norm": "blk.{}.attn_k_norm",
  "blocks/attention_norm": "blk.{}.attn_norm",
  "blocks/attention_post_norm": "blk.{}.post_attention_norm",
  "blocks/mlp/gate": "blk.{}.ffn_gate",
  "blocks/mlp/up": "blk.{}.ffn_up",
  "blocks/mlp/down": "blk.{}.ffn_down",
  "blocks/mlp_norm": "blk.{}.ffn_norm",
  "blocks/mlp_post_norm": "blk.{}.post_ffw_norm",
}
ROPE_FACTORS = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
  name: str  # general.architecture
  model_type: str  # of the Hugging Face family
  optional: Mapping[str, str] = dataclasses.field(default_factory=dict)  # further keys, absent where unset
  interleaved: bool = False  # query and key rows are permuted for llama.cpp's rotation of neighbouring pairs
  norm_offset: bool = False  # norm scales are 1 + the checkpoint's
  transposed: str = "(?!)"  # stems whose matrix Hugging Face keeps [inputs, outputs]
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys of config.json of which it knows one value
  read: Callable[["Metadata"], dict[str, Any]] = lambda m: {}  # what only the architecture implies

  @functools.cached_property
  def keys(self) -> dict[str, str]:
    """Metadata -> config.json."""
    theirs, layernorm = FAMILIES[self.model_type].keys, FAMILIES[self.model_type].fields.get("norm") == "layernorm"
    named = {key.replace("rms_", "") if layernorm else key: field for key, field in FIELDS.items()}
    return {key: theirs[field] for key, field in named.items() if field in theirs}

  @functools.cached_property
  def names(self) -> dict[str, str]:
    """Tensor names without ".weight" or ".bias": Hugging Face -> GGUF; "{}" is the layer."""
    names = {}
    for weight in FAMILIES[self.model_type].weights:
      path = re.sub("/(weight|bias|scale)$", "", weight.ours[0]) if len(weight.ours) == 1 else "blocks/attention"
      names[weight.theirs.rpartition(".")[0].format(layer="{}")] = TENSORS[path]
    return names


class Metadata:
  """Checked look-ups under an architecture's prefix."""

  def __init__(self, entries: Mapping[str, Any], architecture: str):
    self.entries, self.prefix = entries, architecture

  def number(self, key: str, default: float | None = None) -> Any:
    """A number, `default` where there is none; what is said layer by layer must be the same in all of them."""
    value = self.entries.get(f"{self.prefix}.{key}", default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
      value = value[0].item()
    if value is None:
      return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 31:
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} is {value!r}")
    return value

  def positive(self, key: str) -> Any:
    """A number that must be there; whole, unless it is a norm's epsilon."""
    value = self.number(key)
    if value is None:
      raise CheckpointError(f"the GGUF file lacks the metadata {self.prefix}.{key}")
    if not value or not (isinstance(value, int) or key.endswith("epsilon")):
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} is {value!r}")
    return value

  def pattern(self, period: int) -> list[str]:
    """layer_types: every `period`-th layer sees everything, unless the file says it layer by layer."""
    key, layers = "attention.sliding_window_pattern", self.positive("block_count")
    local = self.entries.get(f"{self.prefix}.{key}")
    if not isinstance(local, np.ndarray):
      period = int(self.number(key, period))
      local = [period == 0 or i % period < period - 1 for i in range(layers)]
    if len(local) != layers:
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} has {len(local)} entries for {layers} layers")
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def _gemma(period: int, window: int, largest: int) -> Callable[[Metadata], dict[str, Any]]:
  """`window`: llama.cpp's where the file does not say; 0: none."""

  def read(m):
    # llama.cpp knows the 27B models, which divide by another root, by their number of layers.
    is_largest = m.positive("block_count") == largest
    scalar = m.positive("embedding_length") // m.positive("attention.head_count")
    return {
      "layer_types": m.pattern(period if m.number("attention.sliding_window", window) else 1),
      "query_pre_attn_scalar": scalar if is_largest else m.positive("attention.key_length"),
    }

  return read


_GEMMA_KEYS = {"attention.sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"}
_UNBIASED = {"attention_bias": False}
_ARCHITECTURES = (
  Architecture("llama", "llama", interleaved=True),
  Architecture("llama", "mistral", interleaved=True, only={"sliding_window": None}),
  Architecture("smollm3", "smollm3", interleaved=True),
  Architecture("qwen2", "qwen2"),
  Architecture("qwen3", "qwen3", only=_UNBIASED),
  Architecture("olmo2", "olmo2", only=_UNBIASED | {"tie_word_embeddings": False}),
  Architecture("gemma", "gemma", norm_offset=True, only=_UNBIASED | {"tie_word_embeddings": True}),
  Architecture(
    "gemma2",
    "gemma2",
    optional=_GEMMA_KEYS | {"attn_logit_softcapping": "attn_logit_softcapping"},
    norm_offset=True,
    only=_UNBIASED | {"tie_word_embeddings": True},
    read=_gemma(2, 4096, 46),
  ),
  Architecture(
    "gemma3",
    "gemma3_text",
    optional=_GEMMA_KEYS,
    norm_offset=True,
    only=_UNBIASED,
    read=lambda m: _gemma(6, 0, 62)(m) | {"rope_local_base_freq": m.number("rope.freq_base_swa", 10000.0)},
  ),
  Architecture("gpt2", "gpt2", transposed=r"c_(attn|proj|fc)$"),
)
BY_NAME = {a.name: a for a in reversed(_ARCHITECTURES)}  # of two the first: a Mistral file reads as Llama
BY_MODEL_TYPE = {a.model_type: a for a in _ARCHITECTURES}


def read_config(entries: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
  """The config.json of a GGUF file.

  Args:
    entries: its metadata. tensors: by GGUF's names, dequantized.

  Raises:
    CheckpointError: an architecture that is not known here, or metadata that are missing or senseless.
  """
  name = entry(entries, "general.architecture", str)
  if name not in BY_NAME:
    known = ", ".join(BY_NAME)
    raise CheckpointError(f"the GGUF file has the architecture {name!r}; those that can be read are {known}")
  architecture, m = BY_NAME[name], Metadata(entries, name)
  embedding = tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    raise CheckpointError("the GGUF file lacks the tensor token_embd.weight, or it is no matrix")
  blocks = {int(match[1]) for match in map(re.compile(r"blk\.(\d{1,6})\.").match, tensors) if match}
  if len(blocks) != m.positive("block_count") or max(blocks) != len(blocks) - 1:
    raise CheckpointError(f"the GGUF file says {m.positive('block_count')} layers but has tensors of {len(blocks)}")
  is_llama_like = "attention.key_length" in architecture.keys
  defaults = {"attention.head_count_kv": m.number("attention.head_count")}
  if is_llama_like:
    width = m.positive("embedding_length") // m.positive("attention.head_count")
    defaults |= {"attention.key_length": width, "attention.value_length": width}
  hf: dict[str, Any] = {"model_type": architecture.model_type, "vocab_size": embedding.shape[0]}
  for key, theirs in architecture.keys.items():
    value = defaults[key] if key in defaults and m.number(key) is None else m.positive(key)
    if hf.setdefault(theirs, value) != value:
      raise CheckpointError(f"the GGUF file has keys and values of different widths ({hf[theirs]} and {value})")
  hf |= {theirs: m.number(key) for key, theirs in architecture.optional.items() if m.number(key)}
  hf |= {"tie_word_embeddings": "output.weight" not in tensors}
  if is_llama_like:
    hf |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    kind = entry(entries, f"{name}.rope.scaling.type", str)
    hf |= read_rope(m.number, kind, hf["head_dim"], tensors.get(ROPE_FACTORS))
  return hf | architecture.read(m)


def write_config(hf: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any], Tensors]:
  """The metadata of a config.json, and the tensors that stand for what metadata cannot say.

  Raises:
    ConfigError: GGUF has no such architecture, or llama.cpp would compute something else.
  """
  family = hf.get("model_type")
  if family not in BY_MODEL_TYPE:
    known = ", ".join(BY_MODEL_TYPE)
    raise ConfigError(f"a {family} model cannot be written as GGUF; those that can are {known}")
  architecture = BY_MODEL_TYPE[family]
  full = _explicit(hf, family)
  for key, value in architecture.only.items():
    if full.get(key, value) != value:
      raise ConfigError(f"GGUF has no {architecture.name} model with {key} = {full[key]!r}, only {value!r}")
  numbers = {key: full[theirs] for key, theirs in architecture.keys.items()}
  numbers |= {key: full[theirs] for key, theirs in architecture.optional.items() if full.get(theirs)}
  extra: Tensors = {}
  if "rope_theta" in full:
    numbers |= {"vocab_size": full["vocab_size"]} | write_rope(full)
    if architecture.name == "llama" and (factors := llama3_factors(full)):
      extra = {ROPE_FACTORS: factors}
  if "rope_local_base_freq" in full:
    numbers["rope.freq_base_swa"] = float(full["rope_local_base_freq"])
  entries: dict[str, Any] = {"general.architecture": architecture.name, "general.type": "model"}
  entries |= {f"{architecture.name}.{key}": value for key, value in numbers.items()}
  back = _explicit({**architecture.only, **read_config(entries, _blanks(full) | extra), "model_type": family}, family)
  for key in full.keys() | back.keys():
    if key != "initializer_range" and not _alike(full.get(key), back.get(key)):
      raise ConfigError(
        f"GGUF cannot say {key} = {full.get(key)!r} of a {family} model: llama.cpp would take {back.get(key)!r}"
      )
  return architecture, entries, extra


def _explicit(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
  """The same config.json with every key, defaults included, in the spelling that this package writes."""
  return config_to_huggingface(config_from_huggingface(hf), family)


def _blanks(full: Mapping[str, Any]) -> dict[str, LazyTensor]:
  """The tensors by whose presence `read_config` tells one model from another."""
  layers = full["num_hidden_layers"] if "num_hidden_layers" in full else full["n_layer"]
  present = {
    "output.weight": not full["tie_word_embeddings"],
    "blk.0.attn_q.bias": full.get("attention_bias"),
    "blk.0.ffn_up.bias": full.get("mlp_bias"),
  } | {f"blk.{i}.attn_norm.weight": True for i in range(layers)}
  blanks = {name: in_memory({name: np.zeros(1)})[name] for name, there in present.items() if there}
  return blanks | dict(in_memory({"token_embd.weight": np.broadcast_to(np.int8(0), (full["vocab_size"], 1))}))


def _alike(a: Any, b: Any) -> bool:
  """Equal, but for the rounding of metadata to float32."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b


_STEM = re.compile(r"^(?P<stem>.*?)(?P<kind>\.weight|\.bias)?$")
_NUMBER = re.compile(r"(?<=\.)(\d{1,6})(?=\.)")


def _renamed(name: str, names: Mapping[str, str]) -> str | None:
  stem, kind = _STEM.match(name).group("stem", "kind")  # type: ignore[union-attr]
  layer = _NUMBER.search(stem)
  other = names.get(_NUMBER.sub("{}", stem, count=1))
  if other is None or kind is None or (layer is None) == ("{}" in other):
    return None
  return other.format(layer[1] if layer else "") + kind


def read_tensors(hf: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> Tensors:
  """Tensors under GGUF's names as the checkpoint's.

  Raises:
    CheckpointError: a tensor that the architecture does not have.
  """
  back = {theirs: ours for ours, theirs in architecture.names.items()}
  renamed = {}
  for name, tensor in tensors.items():
    new = _renamed(name, back)
    if new is None and name != ROPE_FACTORS:
      raise CheckpointError(f"the GGUF file has the tensor {name!r}, which a {architecture.name} model here has not")
    if new is not None:
      renamed[new] = _converted(hf, architecture, new, tensor, reading=True)
  return renamed


def write_tensors(hf: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> Tensors:
  """A checkpoint's tensors under GGUF's names, as llama.cpp wants them.

  Raises:
    CheckpointError: a tensor that the architecture does not have.
  """
  renamed = {}
  for name, tensor in tensors.items():
    new = _renamed(name, architecture.names)
    if any(fnmatch.fnmatch(name, buffer) for buffer in BUFFERS):
      continue
    if new is None:
      raise CheckpointError(f"GGUF's architecture {architecture.name} has no place for the tensor {name}")
    if not (name == "lm_head.weight" and hf.get("tie_word_embeddings")):
      renamed[new] = _converted(hf, architecture, name, tensor, reading=False)
  return renamed


def _converted(hf, architecture: Architecture, name: str, tensor: LazyTensor, reading: bool) -> LazyTensor:
  """`name` is Hugging Face's."""
  stem = name.rpartition(".")[0]
  heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(stem.rpartition(".")[2])
  if architecture.interleaved and heads:
    return _mapped(tensor, lambda x: _permuted(x, name, hf[heads], reading))
  if architecture.norm_offset and name.endswith("norm.weight"):
    one = np.float32(-1 if reading else 1)
    return _mapped(tensor, lambda x: x.astype(np.float32) + one, np.dtype("float32"))
  if re.search(architecture.transposed, stem) and name.endswith(".weight"):
    return dataclasses.replace(_mapped(tensor, lambda x: x.T), shape=tensor.shape[::-1])
  return tensor


def _mapped(tensor: LazyTensor, change: Callable, dtype: np.dtype | None = None) -> LazyTensor:
  return LazyTensor(tensor.shape, dtype or tensor.dtype, lambda: change(tensor.read()))


def _permuted(x: np.ndarray, name: str, heads: int, reading: bool) -> np.ndarray:
  """The rows of each head: [2, half] (Hugging Face rotates i with i + half) to [half, 2], or back."""
  if x.shape[0] % (2 * heads):
    raise CheckpointError(f"the tensor {name} has {x.shape[0]} rows, which {heads} heads cannot share in pairs")
  middle = (-1, 2) if reading else (2, -1)
  return x.reshape(heads, *middle, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

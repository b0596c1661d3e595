"""GGUF's architectures: their names for what a Hugging Face family's table has, and what is said nowhere.

Sources: llama.cpp's conversion/*.py (what is written) and src/models/*.cpp (what is read).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.families import FAMILIES

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
  "logit_scale": "logit_scale",
}
# Our parameters -> tensor names without ".weight" or ".bias"; "{}" is the layer.
TENSORS = {
  "embedding/tokens": "token_embd",
  "embedding/positions": "position_embd",
  "final_norm": "output_norm",
  "head": "output",
  "embedding/norm": "token_embd_norm",
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
  "blocks/moe/router": "blk.{}.ffn_gate_inp",
  "blocks/moe/gate": "blk.{}.ffn_gate_exps",  # of all experts
  "blocks/moe/up": "blk.{}.ffn_up_exps",
  "blocks/moe/down": "blk.{}.ffn_down_exps",
  "blocks/mlp_norm": "blk.{}.ffn_norm",
  "blocks/mlp_post_norm": "blk.{}.post_ffw_norm",
}
ROPE_FACTORS = "rope_freqs.weight"
SHARED = {
  "blocks/attention/query": "blocks/attention",
  "blocks/mlp/gate": "blocks/mlp/up",
}  # the first of several in one


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
  write: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda hf: {}  # further metadata
  rope: bool = True
  by_head: str | None = None  # the key of the heads, where query, key and value take turns head by head
  windowless: bool = False  # llama.cpp has no window where the family can have one

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
      path = re.sub("/(weight|bias|scale)$", "", weight.ours[0])
      path = SHARED[path] if len(weight.ours) > 1 else path
      names[weight.theirs.rpartition(".")[0].format(layer="{}", expert="{}")] = TENSORS[path]
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
    if (
      (isinstance(value, bool) and default is not True)
      or not isinstance(value, int | float)
      or not 0 <= value < 1 << 31
    ):
      raise CheckpointError(f"the GGUF metadata {self.prefix}.{key} is {value!r}")
    return value

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
_MIXTRAL = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_MOE = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_QWEN_MOE |= {"expert_feed_forward_length": "moe_intermediate_size"}
# Metadata -> config.json, and what an absent one stands for
_GRANITE = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"}
_GRANITE |= {"logit_scale": "logits_scaling", "attention.scale": "attention_multiplier"}


def _windows(period: int) -> dict[str, Callable]:
  """Windows in some layers, and how both sides say in which."""

  def write(hf):
    local = np.array([kind == "sliding_attention" for kind in hf["layer_types"]])
    return {"attention.sliding_window": hf["sliding_window"], "attention.sliding_window_pattern": local}

  def read(m):
    return {"layer_types": m.pattern(period), "sliding_window": m.number("attention.sliding_window")}

  return {"read": read, "write": write}


_ARCHITECTURES = (
  Architecture("llama", "llama", interleaved=True),
  Architecture("llama", "mistral", interleaved=True, windowless=True),
  Architecture("llama", "mixtral", optional=_MIXTRAL, interleaved=True, windowless=True),
  Architecture("smollm3", "smollm3", interleaved=True),
  Architecture("qwen2", "qwen2"),
  Architecture("qwen3", "qwen3", only=_UNBIASED),
  Architecture("qwen3moe", "qwen3_moe", optional=_QWEN_MOE, only=_UNBIASED, read=lambda m: {"norm_topk_prob": True}),
  Architecture("phi3", "phi3", windowless=True),
  Architecture("starcoder2", "starcoder2", only={"use_bias": True}, windowless=True),
  Architecture(
    "gptneox",
    "gpt_neox",
    only={"attention_bias": True},
    by_head="num_attention_heads",
    read=lambda m: {
      "use_parallel_residual": bool(m.number("use_parallel_residual", True)),
      "hidden_act": "gelu_pytorch_tanh",  # whatever its source said
    },
    write=lambda hf: {"use_parallel_residual": hf["use_parallel_residual"]},
  ),
  Architecture(
    "bloom", "bloom", rope=False, by_head="n_head", write=lambda hf: {"feed_forward_length": 4 * hf["hidden_size"]}
  ),
  Architecture(
    "granite",
    "granite",
    interleaved=True,
    read=lambda m: {theirs: m.number(key, 1.0) for key, theirs in _GRANITE.items()},
    write=lambda hf: {key: float(hf[theirs]) for key, theirs in _GRANITE.items()},
  ),
  Architecture("command-r", "cohere", only=_UNBIASED | {"use_qk_norm": False, "tie_word_embeddings": True}),
  Architecture("cohere2", "cohere2", only=_UNBIASED | {"tie_word_embeddings": True}, **_windows(4)),
  Architecture("glm4", "glm4"),
  Architecture("olmo2", "olmo2", only=_UNBIASED | {"tie_word_embeddings": False}),
  Architecture("olmo2", "olmo3", only=_UNBIASED | {"tie_word_embeddings": False}, **_windows(4)),
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
  Architecture("gpt2", "gpt2", rope=False, transposed=r"c_(attn|proj|fc)$"),
)
BY_MODEL_TYPE = {a.model_type: a for a in _ARCHITECTURES}
_FIRST = {a.name: a for a in reversed(_ARCHITECTURES)}  # a Mistral file reads as Llama
KNOWN = tuple(_FIRST)


def architecture_of(name: str, m: Metadata) -> Architecture:
  """The family by which a file of one of the architectures KNOWN is read."""
  if name == "llama" and m.number("expert_count"):
    return BY_MODEL_TYPE["mixtral"]
  if name == "olmo2" and m.number("attention.sliding_window"):
    return BY_MODEL_TYPE["olmo3"]
  return _FIRST[name]

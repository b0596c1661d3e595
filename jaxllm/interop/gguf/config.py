"""A GGUF file's metadata as a Hugging Face config.json, in both directions, by the tables of architectures.

What llama.cpp assumes without saying so (activations, scales, patterns) is what `read_config` leaves to the
family's own table; `as_gguf` reads its result back, so that a model of which GGUF would tell another
story is refused.
"""

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxllm.base.errors import CheckpointError, ConfigError, shown
from jaxllm.interop.gguf.architectures import BY_MODEL_TYPE, KNOWN, architecture_of
from jaxllm.interop.gguf.header import entry
from jaxllm.interop.gguf.rope import read_rope, rope_factors, write_rope
from jaxllm.interop.gguf.table import Architecture, Metadata
from jaxllm.interop.gguf.tensors import write_tensors
from jaxllm.interop.huggingface import config_from_huggingface, config_to_huggingface
from jaxllm.interop.tensors import Tensors
from jaxllm.models.config import MLPS, ModelConfig

log = logging.getLogger("jaxllm")


# What changes nothing: it follows from the tensors, or is of the training.
_IDLE = {"vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}
_IDLE |= {"feed_forward_length", "expert_feed_forward_length"}


def read_config(entries: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
  """The config.json of a GGUF file; keys that mean nothing here are logged.

  Args:
    entries: its metadata. tensors: by GGUF's names, dequantized.

  Raises:
    CheckpointError: an architecture that is not known here, or metadata that are missing, senseless or of a model that
      the family's is not.
  """
  name = entry(entries, "general.architecture", str)
  if name not in KNOWN:
    known = ", ".join(KNOWN)
    raise CheckpointError(f"the GGUF file has the architecture {name!r}; those that can be read are {known}")
  m = Metadata(entries, name, tensors)
  architecture = architecture_of(name, m)
  hf = _read(m, architecture)
  c = config_from_huggingface(hf)
  if m.flag("attention.causal", True) != (c.architecture != "encoder"):
    raise CheckpointError(f"the GGUF file says attention.causal otherwise than a {c.architecture} {name} model has it")
  if architecture.rope and m.number("rope.dimension_count", c.rotary_dim) != c.rotary_dim:
    said = m.number("rope.dimension_count")
    raise CheckpointError(f"the GGUF file says rope.dimension_count = {said}; a {name} model here has {c.rotary_dim}")
  ours = {key.removeprefix(f"{name}.") for key in entries if key.startswith(f"{name}.")}
  if unread := sorted(ours - m.heeded - _IDLE):
    log.warning("GGUF: the file has metadata that are not read here: %s", ", ".join(map(shown, unread)))
  return hf


def _read(m: Metadata, architecture: Architecture) -> dict[str, Any]:
  """The config.json as one of the families that an architecture's name stands for."""
  tensors = m.tensors
  embedding = tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    raise CheckpointError("the GGUF file lacks the tensor token_embd.weight, or it is no matrix")
  numbered = re.compile(re.escape(architecture.blocks) + r"(\d{1,6})\.")
  blocks, count = {int(match[1]) for match in map(numbered.match, tensors) if match}, m.positive("block_count")
  if len(blocks) != count or max(blocks) != count - 1:
    raise CheckpointError(f"the GGUF file says {count} layers but has tensors of {len(blocks)}")
  _check_experts(m, architecture)
  heads, width = m.positive("attention.head_count"), m.head_width
  defaults = {"attention.head_count_kv": heads, "attention.key_length": width, "attention.value_length": width}
  defaults |= {"decoder_block_count": count}
  hf: dict[str, Any] = {"model_type": architecture.model_type, "vocab_size": embedding.shape[0]}
  for key, theirs in architecture.keys.items():
    value = defaults[key] if key in defaults and m.number(key) is None else m.positive(key)
    if hf.setdefault(theirs, value) != value:
      raise CheckpointError(f"the GGUF file has keys and values of different widths ({hf[theirs]} and {value})")
  hf |= {theirs: m.number(key) for key, theirs in architecture.optional.items() if m.number(key)}
  hf |= {"tie_word_embeddings": "output.weight" not in tensors}
  if architecture.rope:
    biased = any(f"blk.0.attn_{part}.bias" in tensors for part in ("q", "qkv"))
    hf |= {"attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    rotated = m.positive("rope.dimension_count") if architecture.latent else width
    hf |= read_rope(m, rotated, latent=architecture.latent)
  if architecture.activation and (said := m.text("hidden_activation")):
    hf[architecture.activation] = said
  return hf | ({"sliding_window": None} if architecture.windowless else {}) | architecture.read(m)


def _check_experts(m: Metadata, architecture: Architecture) -> None:
  """That the file holds the experts that it counts, before there are names for all of them."""
  count = m.number("expert_count", 0)
  for name, tensor in m.tensors.items():
    if "_exps." in name and tensor.shape[0] != count:
      raise CheckpointError(f"the GGUF file says {count} experts but {name} has {tensor.shape[0]}")
  if count and not any("_exps." in name for name in m.tensors):
    raise CheckpointError(f"the GGUF file says {count} experts but has none")


def as_gguf(hf: Mapping[str, Any], tensors: Tensors) -> tuple[Architecture, dict[str, Any], Tensors]:
  """The metadata of a config.json, and a checkpoint's tensors under GGUF's names, with those that stand for what
  metadata cannot say.

  Raises:
    ConfigError: llama.cpp would compute something else. CheckpointError: see `write_tensors`.
  """
  family = hf["model_type"]
  architecture = BY_MODEL_TYPE[family]
  full = config_to_huggingface(_within_reach(config_from_huggingface(hf), architecture), family)
  for key, value in architecture.only.items():
    if full.get(key, value) != value:
      raise ConfigError(f"GGUF has no {architecture.name} model with {key} = {full[key]!r}, only {value!r}")
  c = config_from_huggingface(full)
  numbers = {key: full[theirs] for key, theirs in architecture.keys.items()}
  numbers |= {key: full[theirs] for key, theirs in architecture.optional.items() if full.get(theirs)}
  numbers |= architecture.write(full)
  if architecture.activation:
    numbers["hidden_activation"] = said = full[architecture.activation]
    if MLPS[c.mlp][0] not in architecture.activations:
      raise ConfigError(
        f"llama.cpp's {architecture.name} has no activation {said!r} (config.json's {architecture.activation})"
      )
    if c.mlp in ("gelu", "geglu"):
      log.warning("GGUF: llama.cpp takes GELU's tanh approximation for its exact form; outputs differ by some 1e-3")
  written = dict(write_tensors(hf, architecture, tensors))
  if architecture.rope:
    sizes = {"rope_theta": c.rope_theta, "head_dim": c.head_dim, "rotary_dim": c.rotary_dim}
    rope = {"rope_scaling": full.get("rope_scaling") or full.get("rope_parameters")} | sizes
    numbers |= {"vocab_size": full["vocab_size"]} | write_rope(rope, latent=architecture.latent)
    factors = rope_factors(rope)
    if factors and not architecture.factors:
      kind = rope["rope_scaling"]["rope_type"]
      raise ConfigError(f"GGUF cannot say rope_scaling = {kind!r} of a {family} model: llama.cpp has no divisors there")
    written |= factors
  if "rope_local_base_freq" in full:
    numbers["rope.freq_base_swa"] = float(full["rope_local_base_freq"])
  entries: dict[str, Any] = {"general.architecture": architecture.name, "general.type": "model"}
  entries |= {f"{architecture.name}.{key}": value for key, value in numbers.items()}
  if architecture.name == "bert":
    entries["tokenizer.ggml.token_type_count"] = max(c.num_token_types, 1)  # which it wants where there is no table too
  if c.head == "sequence":
    names = hf.get("id2label") or full["id2label"]
    entries[f"{architecture.name}.classifier.output_labels"] = [str(names[key]) for key in sorted(names, key=int)]
  read = _read(Metadata(entries, architecture.name, written), architecture)
  back = _explicit({**architecture.only, **read, "model_type": family}, family)
  for key in sorted(full.keys() | back.keys()):
    if key not in ("initializer_range", "router_aux_loss_coef") and not _alike(full.get(key), back.get(key)):
      raise ConfigError(
        f"GGUF cannot say {key} = {full.get(key)!r} of a {family} model: llama.cpp would take {back.get(key)!r}"
      )
  return architecture, entries, written


def _within_reach(c: ModelConfig, architecture: Architecture) -> ModelConfig:
  """The same model up to the length of a window that llama.cpp has not, where it sees everything; and up to that from
  which RoPE's base grows with a text."""
  if c.rope_scaling and c.rope_scaling.kind == "dynamic":
    if c.rope_switch is not None:
      log.warning("GGUF: llama.cpp has no dynamic NTK, so the file says %d tokens of context", c.rope_switch)
    c = dataclasses.replace(c, rope_scaling=None, max_seq_len=c.rope_switch or c.max_seq_len)
  if not architecture.windowless or c.sliding_window is None:
    return c
  if c.sliding_window < c.max_seq_len:
    log.warning(
      "GGUF: llama.cpp has no window for a %s model, so the file says %d tokens of context, not %d",
      *(architecture.model_type, c.sliding_window, c.max_seq_len),
    )
  return dataclasses.replace(c, sliding_window=None, max_seq_len=min(c.sliding_window, c.max_seq_len))


def _explicit(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
  """The same config.json with every key, defaults included, in the spelling that this package writes."""
  return config_to_huggingface(config_from_huggingface(hf), family)


def _alike(a: Any, b: Any) -> bool:
  """Equal, but for the rounding of metadata to float32."""
  if isinstance(a, dict) and isinstance(b, dict):
    return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
  if isinstance(a, list | tuple) and isinstance(b, list | tuple):
    return len(a) == len(b) and all(map(_alike, a, b))
  if isinstance(a, float) and isinstance(b, float):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b

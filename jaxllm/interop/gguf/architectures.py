"""A GGUF file's config and tensors as Hugging Face's, in both directions, by the table of architectures.

What llama.cpp assumes without saying so (activations, scales, patterns) is what `read_config` leaves to the
family's own table; `write_config` reads its result back, so that a model of which GGUF would tell another
story is refused.
"""

import dataclasses
import fnmatch
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf.header import entry
from jaxllm.interop.gguf.rope import llama3_factors, read_rope, write_rope
from jaxllm.interop.gguf.table import BY_MODEL_TYPE, KNOWN, ROPE_FACTORS, Architecture, Metadata, architecture_of
from jaxllm.interop.huggingface import BUFFERS, config_from_huggingface, config_to_huggingface
from jaxllm.interop.tensors import LazyTensor, Tensors, from_parts, in_memory

log = logging.getLogger("jaxllm")


def read_config(
  entries: Mapping[str, Any], tensors: Tensors, architecture: Architecture | None = None
) -> dict[str, Any]:
  """The config.json of a GGUF file.

  Args:
    entries: its metadata. tensors: by GGUF's names, dequantized.
    architecture: of several families that one name stands for; None: that which the metadata tell.

  Raises:
    CheckpointError: an architecture that is not known here, or metadata that are missing or senseless.
  """
  name = entry(entries, "general.architecture", str)
  if name not in KNOWN:
    known = ", ".join(KNOWN)
    raise CheckpointError(f"the GGUF file has the architecture {name!r}; those that can be read are {known}")
  m = Metadata(entries, name)
  architecture = architecture or architecture_of(name, m)
  embedding = tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    raise CheckpointError("the GGUF file lacks the tensor token_embd.weight, or it is no matrix")
  blocks = {int(match[1]) for match in map(re.compile(r"blk\.(\d{1,6})\.").match, tensors) if match}
  if len(blocks) != m.positive("block_count") or max(blocks) != len(blocks) - 1:
    raise CheckpointError(f"the GGUF file says {m.positive('block_count')} layers but has tensors of {len(blocks)}")
  heads = m.positive("attention.head_count")
  width = m.number("attention.key_length") or m.positive("embedding_length") // heads
  lengths = {"attention.key_length": width, "attention.value_length": width}
  defaults = {"attention.head_count_kv": heads} | lengths
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
    kind = entry(entries, f"{name}.rope.scaling.type", str)
    hf |= read_rope(m.number, kind, width, tensors.get(ROPE_FACTORS))
  return hf | ({"sliding_window": None} if architecture.windowless else {}) | architecture.read(m)


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
  if architecture.windowless and full.get("sliding_window"):
    full = _within_window(full, family)
  if full.get("hidden_act") == "gelu" and config_from_huggingface(full).mlp == "gelu":
    log.warning("GGUF: llama.cpp takes GELU's tanh approximation for its exact form; logits differ by some 1e-3")
    full = _explicit(full | {"hidden_act": "gelu_pytorch_tanh"}, family)
  for key, value in architecture.only.items():
    if full.get(key, value) != value:
      raise ConfigError(f"GGUF has no {architecture.name} model with {key} = {full[key]!r}, only {value!r}")
  c = config_from_huggingface(full)
  numbers = {key: full[theirs] for key, theirs in architecture.keys.items()}
  numbers |= {key: full[theirs] for key, theirs in architecture.optional.items() if full.get(theirs)}
  numbers |= architecture.write(full)
  extra: Tensors = {}
  if architecture.rope:
    sizes = {"rope_theta": c.rope_theta, "head_dim": c.head_dim, "rotary_dim": c.rotary_dim}
    rope = {"rope_scaling": full.get("rope_scaling")} | sizes
    numbers |= {"vocab_size": full["vocab_size"]} | write_rope(rope)
    if architecture.name == "llama" and (factors := llama3_factors(rope)):
      extra = {ROPE_FACTORS: factors}
  if "rope_local_base_freq" in full:
    numbers["rope.freq_base_swa"] = float(full["rope_local_base_freq"])
  entries: dict[str, Any] = {"general.architecture": architecture.name, "general.type": "model"}
  entries |= {f"{architecture.name}.{key}": value for key, value in numbers.items()}
  read = read_config(entries, _blanks(full) | extra, architecture)
  back = _explicit({**architecture.only, **read, "model_type": family}, family)
  for key in sorted(full.keys() | back.keys()):
    if key not in ("initializer_range", "router_aux_loss_coef") and not _alike(full.get(key), back.get(key)):
      raise ConfigError(
        f"GGUF cannot say {key} = {full.get(key)!r} of a {family} model: llama.cpp would take {back.get(key)!r}"
      )
  return architecture, entries, extra


def _within_window(full: dict[str, Any], family: str) -> dict[str, Any]:
  """The same model up to the length of its window, where it sees everything."""
  window, length = full["sliding_window"], full["max_position_embeddings"]
  if window < length:
    log.warning(
      "GGUF: llama.cpp has no window for a %s model, so the file says %d tokens of context, not %d",
      family,
      window,
      length,
    )
  return _explicit(full | {"sliding_window": None, "max_position_embeddings": min(window, length)}, family)


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


def _renamed(name: str, names: Mapping[str, str]) -> tuple[str, tuple[int, ...]] | None:
  """The other name with a place for each number, and the numbers (layer, expert); None: there is no other."""
  stem, kind = _STEM.match(name).group("stem", "kind")  # type: ignore[union-attr]
  other = names.get(_NUMBER.sub("{}", f"{stem}.")[:-1])
  numbers = tuple(map(int, _NUMBER.findall(f"{stem}.")))
  if other is None or kind is None or (not numbers) == ("{}" in other):
    return None
  return other + kind, numbers


def read_tensors(hf: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> Tensors:
  """Tensors under GGUF's names as the checkpoint's.

  Raises:
    CheckpointError: a tensor that the architecture does not have.
  """
  back = {theirs: ours for ours, theirs in architecture.names.items()}
  renamed = {}
  for name, tensor in tensors.items():
    found = _renamed(name, back)
    if found is None:
      if name == ROPE_FACTORS:
        continue
      raise CheckpointError(f"the GGUF file has the tensor {name!r}, which a {architecture.name} model here has not")
    new, numbers = found
    if new.count("{}") > len(numbers):  # of all experts
      for expert in range(tensor.shape[0]):
        one = LazyTensor(tensor.shape[1:], tensor.dtype, lambda tensor=tensor, expert=expert: tensor.part((expert,)))
        renamed[new.format(*numbers, expert)] = one
    else:
      new = new.format(*numbers)
      renamed[new] = _converted(hf, architecture, new, tensor, reading=True)
  return renamed


def write_tensors(hf: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> Tensors:
  """A checkpoint's tensors under GGUF's names, as llama.cpp wants them.

  Raises:
    CheckpointError: a tensor that the architecture does not have.
  """
  renamed: dict[str, LazyTensor] = {}
  experts: dict[str, dict[int, LazyTensor]] = {}
  for name, tensor in tensors.items():
    if any(fnmatch.fnmatch(name, buffer) for buffer in BUFFERS):
      continue
    found = _renamed(name, architecture.names)
    if found is None:
      raise CheckpointError(f"GGUF's architecture {architecture.name} has no place for the tensor {name}")
    new, numbers = found
    if len(numbers) > 1:
      experts.setdefault(new.format(*numbers), {})[numbers[1]] = tensor
    elif not (new == "output.weight" and hf.get("tie_word_embeddings")):
      renamed[new.format(*numbers)] = _converted(hf, architecture, name, tensor, reading=False)
  for name, parts in experts.items():
    shape = (len(parts), *parts[min(parts)].shape)
    if sorted(parts) != list(range(len(parts))) or any(part.shape != shape[1:] for part in parts.values()):
      raise CheckpointError(f"the checkpoint lacks an expert of {name} (GGUF's name), or they differ in shape")
    renamed[name] = from_parts(shape, parts[0].dtype, 1, lambda index, parts=parts: parts[index[0]].read())
  return renamed


def _converted(hf, architecture: Architecture, name: str, tensor: LazyTensor, reading: bool) -> LazyTensor:
  """`name` is Hugging Face's."""
  stem = name.rpartition(".")[0]
  heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(stem.rpartition(".")[2])
  if architecture.interleaved and heads:
    return _mapped(tensor, lambda x: _permuted(x, name, hf[heads], reading))
  if architecture.by_head and stem.endswith("query_key_value"):
    return _mapped(tensor, lambda x: _grouped(x, name, hf[architecture.by_head], reading))
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


def _grouped(x: np.ndarray, name: str, heads: int, reading: bool) -> np.ndarray:
  """Rows of [heads, 3] (query, key and value of a head side by side) as [3, heads], or back."""
  if x.shape[0] % (3 * heads):
    raise CheckpointError(f"the tensor {name} has {x.shape[0]} rows, which {heads} heads cannot share in three")
  outer = (3, heads) if reading else (heads, 3)
  return x.reshape(*outer, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

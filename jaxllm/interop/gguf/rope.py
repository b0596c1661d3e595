"""RoPE scaling in GGUF: numbers in the metadata; of Llama 3.1 and LongRoPE a tensor of divisors, one a frequency."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.gguf.table import Metadata
from jaxllm.interop.tensors import Tensors, in_memory

FACTORS = "rope_freqs.weight"  # Llama 3's
# LongRoPE's, of which llama.cpp takes the first where it was given a longer context than the original one.
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_ORIGINAL, _ATTENTION = "rope.scaling.original_context_length", "rope.scaling.attn_factor"

_YARN = {
  "original_max_position_embeddings": _ORIGINAL,
  "beta_fast": "rope.scaling.yarn_beta_fast",
  "beta_slow": "rope.scaling.yarn_beta_slow",
}
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
_LATENT = "rope.scaling.yarn_log_multiplier"  # a tenth of DeepSeek's mscale_all_dim, as its converter writes it
# llama.cpp reads llama3's divisors alone, and other writers leave these numbers out: then they are those of
# every Llama 3.
_LLAMA3 = {
  "low_freq_factor": ("rope.scaling.low_freq_factor", 1.0),
  "high_freq_factor": ("rope.scaling.high_freq_factor", 4.0),
  "original_max_position_embeddings": (_ORIGINAL, 8192),
}


def read_rope(m: Metadata, head_dim: int, latent: bool = False) -> dict[str, Any]:
  """`rope_theta` and the rest, of config.json.

  Args:
    latent: of DeepSeek's attention.

  Raises:
    CheckpointError: scaling of a kind that is not known here.
  """
  number, kind, tensors = m.number, m.text("rope.scaling.type"), m.tensors
  hf: dict[str, Any] = {"rope_theta": float(number("rope.freq_base", 10000.0))}
  rotated = number("rope.dimension_count", head_dim)
  if rotated != head_dim:
    hf["partial_rotary_factor"] = rotated / head_dim
  factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0))
  scaling: dict[str, Any] = {}
  if LONG_FACTORS in tensors and SHORT_FACTORS in tensors:
    scaling = _read_longrope(number, tensors)
  elif (factors := tensors.get(FACTORS)) is not None:
    scaling = {"rope_type": "llama3", "factor": float(factors.read().max())}
    scaling |= {theirs: number(key, usual) for theirs, (key, usual) in _LLAMA3.items()}
    again = _llama3_factors(scaling, hf["rope_theta"], head_dim)
    if again.shape != factors.shape or not np.allclose(again, factors.read(), rtol=1e-4):
      raise CheckpointError("the GGUF file's rope_freqs.weight is not that of Llama 3's RoPE scaling")
  elif kind in (None, "linear") and factor not in (0, 1):
    scaling = {"rope_type": "linear", "factor": factor}
  elif kind == "yarn" and factor > 0:
    scaling = {"rope_type": "yarn", "factor": factor}
    found = {theirs: number(key) for theirs, key in _YARN.items()}
    # Its converter writes Hugging Face's number as yarn_attn_factor, but what llama.cpp reads is attn_factor,
    # by which it multiplies yarn's usual temperature.
    scale = number(_ATTENTION)
    computed = None if scale is None else scale * _temperature(factor)
    found["attention_factor"] = number("rope.scaling.yarn_attn_factor", computed)
    if latent and (multiplier := number(_LATENT)):
      found |= {"mscale_all_dim": round(multiplier / 0.1, 6), "attention_factor": 1.0}
    scaling |= {key: value for key, value in found.items() if value is not None}
  elif kind not in (None, "none", "linear"):
    raise CheckpointError(f"the GGUF file has RoPE scaling of type {kind!r}; those known are linear and yarn")
  return hf | ({"rope_scaling": scaling} if scaling else {})


def write_rope(hf: Mapping[str, Any], latent: bool = False) -> dict[str, Any]:
  """The metadata of `rope_theta` and `rope_scaling`, keys behind the architecture.

  Raises:
    ConfigError: YaRN with betas that llama.cpp does not read, or temperatures that it has not for DeepSeek's attention.
  """
  numbers = {"rope.freq_base": float(hf["rope_theta"]), "rope.dimension_count": hf["rotary_dim"]}
  scaling = hf.get("rope_scaling") or {}
  kind = scaling.get("rope_type")
  if kind in ("linear", "yarn"):
    numbers |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
  if kind == "yarn":
    for name, value in _BETAS.items():
      if scaling.get(name, value) != value:
        raise ConfigError(f"GGUF cannot say YaRN's {name} = {scaling[name]}: llama.cpp takes {value} whatever it says")
    numbers |= {key: scaling[theirs] for theirs, key in _YARN.items() if theirs in scaling}
    if latent:
      if not scaling.get("mscale_all_dim") or scaling.get("attention_factor") != 1:
        raise ConfigError("GGUF has YaRN for a DeepSeek model only where mscale and mscale_all_dim are the same")
      numbers[_LATENT] = 0.1 * scaling["mscale_all_dim"]
    elif "attention_factor" in scaling:
      numbers["rope.scaling.yarn_attn_factor"] = scaling["attention_factor"]
      numbers[_ATTENTION] = scaling["attention_factor"] / _temperature(scaling["factor"])
  if kind == "llama3":
    numbers |= {key: scaling[theirs] for theirs, (key, _) in _LLAMA3.items()}
  if kind == "longrope":
    original = scaling["original_max_position_embeddings"]
    numbers |= {"rope.scaling.type": kind, _ORIGINAL: original}
    numbers[_ATTENTION] = scaling.get("attention_factor") or _longrope_temperature(scaling["factor"], original)
  return numbers


def rope_factors(hf: Mapping[str, Any]) -> Tensors:
  """The tensors of divisors that a scaling has."""
  scaling, parts = hf.get("rope_scaling") or {}, dict[str, Any]()
  if scaling.get("rope_type") == "longrope":
    parts = {LONG_FACTORS: scaling["long_factor"], SHORT_FACTORS: scaling["short_factor"]}
  if scaling.get("rope_type") == "llama3":
    parts = {FACTORS: _llama3_factors(scaling, hf["rope_theta"], hf["head_dim"])}
  return in_memory({name: np.array(part, np.float32) for name, part in parts.items()})


def _read_longrope(number: Callable, tensors: Tensors) -> dict[str, Any]:
  length = number("context_length")
  original, attention = number(_ORIGINAL, length), number(_ATTENTION, 1.0)
  short, long = ([float(str(x)) for x in tensors[name].read()] for name in (SHORT_FACTORS, LONG_FACTORS))
  scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
  scaling |= {"factor": length / original, "original_max_position_embeddings": original}
  usual = _longrope_temperature(length / original, original)
  return scaling | ({} if math.isclose(attention, usual, rel_tol=1e-6) else {"attention_factor": attention})


def _llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> np.ndarray:
  """What the frequencies are divided by."""
  low, high, context = (scaling[theirs] for theirs in _LLAMA3)
  frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
  turns = context * frequencies / (2 * math.pi)
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _temperature(factor: float) -> float:
  return 1 + 0.1 * math.log(factor)


def _longrope_temperature(factor: float, original: int) -> float:
  return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0

"""RoPE settings of config.json: `rope_theta` and `rope_scaling`, or (from 2026) `rope_parameters`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import ConfigError, shown
from jaxllm.interop.families.table import Transform, Weight, transposed
from jaxllm.models.config import ModelConfig, RopeScaling

# The numbers of a `RopeScaling` of each kind, beside "factor".
_NUMBERS: dict[str, tuple[str, ...]] = {
  "linear": (),
  "dynamic": ("original_max_seq_len",),
  "longrope": ("short_factors", "long_factors", "attention_factor", "original_max_seq_len"),
  "llama3": ("low_freq_factor", "high_freq_factor", "original_max_seq_len"),
  "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale_all_dim", "truncate", "original_max_seq_len"),
}
# Theirs, where it is another name
_THEIRS = {"original_max_seq_len": "original_max_position_embeddings"}
_THEIRS |= {"short_factors": "short_factor", "long_factors": "long_factor"}

# Families that have `rope_parameters` for each kind of layer.
BY_KIND = {"gemma3", "gemma3_text", "modernbert", "olmo3"}


def rope_settings(hf: Mapping[str, Any]) -> dict[str, Any]:
  """What config.json says of RoPE. Of both keys `rope_scaling` counts alone, as in transformers: it is what somebody
  added by hand. A theta that stands only in `rope_parameters` then counts no more."""
  return hf.get("rope_scaling") or hf.get("rope_parameters") or {}


def rope_by_kind(hf: Mapping[str, Any], kind: str, scaled: bool) -> dict[str, Any]:
  """The same of one kind of layer ("full_attention", "sliding_attention"), where each has a group in
  `rope_parameters`. `scaled`: `rope_scaling` changes it."""
  own = (hf.get("rope_parameters") or {}).get(kind) or {"rope_type": "default"}  # goes before an added `type`
  both = {**own, **((hf.get("rope_scaling") or {}) if scaled else {})}
  return {key: value for key, value in both.items() if key != "truncate"}  # transformers looks for it elsewhere


def read_rope(hf: Mapping[str, Any], fraction: float | None = None) -> dict[str, Any]:
  """The RoPE fields of a ModelConfig, and the length that YaRN and dynamic NTK stretch it to.

  Args:
    fraction: of a head that is rotated where nothing says it; None: all of it whatever is said, as in families whose
      code has no `partial_rotary_factor`.

  Raises:
    ConfigError: an unknown kind of scaling.
  """
  settings = rope_settings(hf)
  kind = settings.get("rope_type", settings.get("type", "default"))
  fields: dict[str, Any] = {}
  theta = settings.get("rope_theta", hf.get("rope_theta"))
  if theta is not None:
    fields["rope_theta"] = float(theta)
  if fraction is not None:
    fields["rope_fraction"] = float(settings.get("partial_rotary_factor", hf.get("partial_rotary_factor", fraction)))
  if kind == "default":
    return fields
  if kind not in _NUMBERS:
    raise ConfigError(
      f"config.json has RoPE scaling of type {shown(kind)}; those known are {', '.join(_NUMBERS)} "
      "(remove it to run at the trained length)"
    )
  said = {name: settings.get(_THEIRS.get(name, name)) for name in _NUMBERS[kind]}
  numbers = {name: tuple(map(float, x)) if isinstance(x, list) else x for name, x in said.items() if x is not None}
  if kind == "dynamic":  # transformers grows the base from here on, whatever else is said
    numbers["original_max_seq_len"] = hf["max_position_embeddings"]
  elif "original_max_seq_len" in _NUMBERS[kind]:
    numbers.setdefault("original_max_seq_len", hf["max_position_embeddings"])
  factor = settings.get("factor")
  if factor is None and "original_max_seq_len" not in numbers:
    raise ConfigError(f"config.json has RoPE scaling of type {kind!r} without a factor")
  if factor is None:
    factor = hf["max_position_embeddings"] / numbers["original_max_seq_len"]
  if kind == "yarn" and settings.get("mscale") and settings.get("mscale_all_dim"):
    # DeepSeek: the ratio of two temperatures; an explicit attention_factor goes first.
    grow = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    numbers.setdefault("attention_factor", grow(settings["mscale"]) / grow(settings["mscale_all_dim"]))
  fields["rope_scaling"] = RopeScaling(kind=kind, factor=float(factor), **numbers)
  if kind == "dynamic":
    fields["max_seq_len"] = round(max(factor, 1.0) * numbers["original_max_seq_len"])
  if kind == "yarn":  # files name the length before or after it
    fields["max_seq_len"] = max(hf["max_position_embeddings"], round(factor * numbers["original_max_seq_len"]))
  return fields


def write_rope(c: ModelConfig) -> dict[str, Any]:
  """`rope_theta`, and `rope_scaling` where there is one: the form that every version reads."""
  hf: dict[str, Any] = {"rope_theta": c.rope_theta}
  if c.rope_scaling is not None:
    kind = c.rope_scaling.kind
    numbers = {_THEIRS.get(name, name): getattr(c.rope_scaling, name) for name in _NUMBERS[kind]}
    numbers = {name: x for name, x in numbers.items() if x is not None and x is not True}  # `truncate`: if False
    hf["rope_scaling"] = {"rope_type": kind, "factor": c.rope_scaling.factor} | numbers
    if kind == "dynamic":
      hf["max_position_embeddings"] = c.rope_scaling.original_max_seq_len
  return hf


def halves(x: np.ndarray, width: int, rotated: slice = slice(None), inverse: bool = False) -> np.ndarray:
  """The `rotated` of every `width` of the last axis: in pairs (0, 1), (2, 3), … as others rotate them, to the first of
  all pairs before the second of all, as `apply_rope` does; or back."""
  heads = x.reshape(*x.shape[:-1], -1, width).copy()
  part, pairs = heads[..., rotated], (2, -1) if inverse else (-1, 2)
  heads[..., rotated] = np.swapaxes(part.reshape(*part.shape[:-1], *pairs), -1, -2).reshape(part.shape)
  return heads.reshape(x.shape)


def in_pairs(
  layout: Callable[[Any], tuple[int, slice]], turn: Callable[[np.ndarray], np.ndarray] = transposed
) -> Transform:
  """A projection whose outputs are rotated in neighbouring pairs: `width` and `rotated` of `halves`."""
  return Transform(
    lambda c, x, shapes: [halves(turn(x), *layout(c))],
    lambda c, weights: turn(halves(weights[0], *layout(c), inverse=True)),
  )


def interleaved(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
  """A table whose query and key are rotated in neighbouring pairs (GPT-J, GLM, Cohere)."""
  layout = lambda c: (c.head_dim, slice(c.rotary_dim))  # noqa: E731
  ways = {f"blocks/attention/{name}": in_pairs(layout) for name in ("query", "key")}
  scale = in_pairs(layout, turn=lambda x: x)
  ways |= {f"blocks/attention/{name}_norm": scale for name in ("query", "key")}
  way_of = lambda w: ways.get(w.ours[0].rpartition("/")[0], w.transform)  # noqa: E731
  return tuple(dataclasses.replace(w, transform=way_of(w)) for w in weights)


def canonical_rope(c: ModelConfig) -> ModelConfig:
  """The same model with NTK scaling written as the theta that it amounts to, and unused numbers reset."""
  scaling = c.rope_scaling
  if "local" not in c.layer_kinds:
    c = dataclasses.replace(c, rope_local_theta=None)
  elif c.rope_local_theta is None and scaling is None:
    c = dataclasses.replace(c, rope_local_theta=c.rope_theta)
  if c.position != "rope":
    unused = {name: getattr(ModelConfig, name) for name in ("rope_theta", "rope_local_theta", "rope_fraction")}
    return dataclasses.replace(c, **unused, rope_scaling=None)
  if scaling is None:
    return c
  if scaling.kind == "ntk":
    theta = c.rope_theta * scaling.factor ** (c.rotary_dim / (c.rotary_dim - 2))
    return dataclasses.replace(c, rope_theta=theta, rope_scaling=None)
  used = {name: getattr(scaling, name) for name in _NUMBERS[scaling.kind]}
  stretched = round(max(scaling.factor, 1.0) * scaling.original_max_seq_len)
  if scaling.kind == "dynamic":  # no file says how long its texts may be
    c = dataclasses.replace(c, max_seq_len=stretched)
  stretched = stretched if scaling.kind == "yarn" else 0
  scaling = RopeScaling(scaling.kind, scaling.factor, **used)
  return dataclasses.replace(c, rope_scaling=scaling, max_seq_len=max(c.max_seq_len, stretched))

"""Adapters written as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

import collections
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.base import digests
from jaxllm.base.errors import ConfigError
from jaxllm.base.files import new_directory
from jaxllm.data.tokenizers import Tokenizer
from jaxllm.interop.adapter import Change
from jaxllm.interop.directory_files import write_json
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.huggingface import Place, places
from jaxllm.interop.huggingface_directory import families_of
from jaxllm.interop.peft import EMBEDDING, LINEAR, MAGNITUDE, PREFIX, TABLE, WEIGHTS_FILE, inputs_first
from jaxllm.interop.peft_config import CONFIG_FILE, ends, is_adapter
from jaxllm.interop.safetensors import write_safetensors
from jaxllm.interop.stored import param_shapes
from jaxllm.interop.tensors import LazyTensor, Tensors, in_memory
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import trimmed

TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS", "none": "FEATURE_EXTRACTION"}


def write_adapter(
  directory: Path,
  config: ModelConfig,
  changes: Mapping[str, Change],
  full: Tensors | None = None,
  *,
  base: str | None = None,
  family: str | None = None,
  tokenizer: Tokenizer | None = None,
) -> None:
  """Writes an adapter's directory, or replaces one; it appears when it is complete.

  Where a family has several of our matrices in one tensor (query, key and value), the module's rank is the sum of
  theirs, unless they share their first factor.

  Args:
    changes: by parameter, see `changes_of`. full: the parameters that were trained whole.
    base: the model that it belongs to, as PEFT is to find it. family: whose names it is to have; None: the first that
      can express the model. tokenizer: that goes with it, of which it may be the only one that knows new tokens.

  Raises:
    ConfigError: PEFT or the family has no form for it. CheckpointError: the path holds something else.
  """
  known, head = _known(config, family)
  full = full or {}
  modules = {name.removesuffix(".weight"): place for name, place in known.items() if name.endswith(".weight")}
  tensors: dict[str, np.ndarray] = {}
  ranks: dict[str, int] = {}
  alphas: dict[str, float] = {}
  for module, place in modules.items():
    own = {path: changes[path] for path in place.weight.ours if path in changes and changes[path].where[place.at]}
    if own and ".experts." in module:  # transformers has them in one tensor
      raise ConfigError(f"PEFT has no module for the matrix of one expert, as of {module}")
    if own:
      parts, scale = _module(config, module, place, own)
      tensors |= {module + ending: part for ending, part in parts.items()}
      ranks[module] = next(iter(parts.values())).shape[0]
      alphas[module] = _alpha(scale, ranks[module])
  written = {path for module in ranks for path in modules[module].weight.ours}
  if lost := sorted(changes.keys() - written):
    raise ConfigError(f"PEFT has no module with {', '.join(lost)} alone, so their adapters cannot be written")
  lazy, saved = _whole(config, known, full)
  if config.architecture == "encoder_decoder" and TABLE in {*changes, *full}:
    raise ConfigError("PEFT has no adapter for an embedding that an encoder and a decoder share")
  if config.tie_embeddings and config.head == "lm":  # the head takes part, and PEFT keeps copies for it
    if found := next((m for m in ranks if modules[m].weight.ours == (TABLE,)), None):
      if changes[TABLE].magnitude is not None:
        raise ConfigError("PEFT has no DoRA for an embedding that is the head too")
      tensors |= {head + end: tensors[found + own].T for end, own in zip(LINEAR, reversed(EMBEDDING))}
      ranks[head], alphas[head] = ranks[found], alphas[found]
    if found := next((m for m in saved if modules[m].weight.ours == (TABLE,)), None):
      lazy[f"{head}.weight"] = lazy[f"{found}.weight"]
      saved.append(head)
  settings = _settings(config, modules, ranks, alphas, saved, changes) | {"base_model_name_or_path": base}
  lazy |= in_memory(tensors)
  with new_directory(directory, is_adapter) as new:
    write_safetensors(new / WEIGHTS_FILE, {PREFIX + name: tensor for name, tensor in lazy.items()})
    write_json(new / CONFIG_FILE, settings)
    if tokenizer is not None:
      tokenizer.save(new)
    digests.seal(new)


def _known(config: ModelConfig, family: str | None) -> tuple[dict[str, Place], str]:
  """The tensors of the model that PEFT sees, by name: as transformers has it in memory. And its head's module.

  Raises:
    ConfigError: there is no such model.
  """
  if config.adapter is not None:
    raise ConfigError("no Hugging Face family has what model.adapter puts into blocks")
  families = (family,) if family else families_of(config)
  if not families:
    raise ConfigError("no Hugging Face family can express this model, so PEFT has no names for its modules")
  return places(config, families[0], ("lm_head.weight",))[0], FAMILIES[families[0]].head.removesuffix(".weight")


# Factors


def _module(
  config: ModelConfig, module: str, place: Place, changes: Mapping[str, Change]
) -> tuple[dict[str, np.ndarray], float]:
  """A module's factors by the ends of their names, A's [r, inputs] first, and what their product is multiplied by."""
  paths, shapes = place.weight.ours, param_shapes(config)
  outputs = [shapes[path][-1] for path in paths]
  factors = {path: _factors(change, place.at) for path, change in changes.items()}
  scale = float(next(iter(changes.values())).scales[place.at])
  first, *others = (a for a, _ in factors.values())
  shared = all(np.array_equal(first, a) for a in others)
  a = first if shared else np.concatenate([first, *others], -1)
  pieces, row = [], 0
  for path, count in zip(paths, outputs):
    whole = np.zeros((a.shape[-1], count), np.float32)
    if path in factors:
      b = factors[path][1]
      its = float(changes[path].scales[place.at])
      start, row = (0, row) if shared else (row, row + len(b))
      whole[start : start + len(b)] = b if its == scale else b * np.float32(its / scale)
    pieces.append(whole)
  b = place.weight.transform.write(config, pieces)
  b = b.T if inputs_first(config, place, outputs) else b
  table = paths[0].startswith("embedding/")
  found = dict(zip(EMBEDDING if table else LINEAR, (a.T, b)))
  lengths = [change.magnitude for change in changes.values() if change.magnitude is not None]
  if lengths:
    if len(lengths) < len(paths):
      raise ConfigError(f"{module} has DoRA in some of its parts only, which PEFT's cannot have")
    own = [changes[path].magnitude.part(place.at).astype(np.float32) for path in paths]  # type: ignore[union-attr]
    found[MAGNITUDE] = place.weight.transform.write(config, own)
  return {ending: np.ascontiguousarray(x) for ending, x in found.items()}, scale


def _factors(change: Change, at: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """a and b of one matrix, in float32, without the zeros that fill up its stack."""
  a, b = (tensor.part(at).astype(np.float32) for tensor in (change.a, change.b))
  rank = max(1, trimmed(a, b))
  return a[:, :rank], b[:rank]


def _alpha(scale: float, rank: int) -> float:
  """The shortest number that divided by the rank is the scale."""
  return next((a for a in (round(scale * rank, digits) for digits in range(16)) if a / rank == scale), scale * rank)


def _whole(config: ModelConfig, known: Mapping[str, Place], full: Tensors) -> tuple[dict[str, LazyTensor], list[str]]:
  """The tensors of modules that were trained whole, by name, and these modules.

  Raises:
    ConfigError: of a module only a part was trained.
  """
  tensors: dict[str, LazyTensor] = {}
  parts: dict[str, list[str]] = collections.defaultdict(list)
  for name in known:
    parts[name.rpartition(".")[0]].append(name)
  wanted = {name for name, place in known.items() if set(place.weight.ours) & set(full)}
  saved = [module for module, names in parts.items() if wanted.intersection(names)]
  for name in (name for module in saved for name in parts[module]):
    place = known[name]
    if lacking := [path for path in place.weight.ours if path not in full]:
      raise ConfigError(f"PEFT saves the module of {name} whole, but {lacking[0]} was not trained")
    read = lambda p=place: p.weight.transform.write(config, [full[path].part(p.at) for path in p.weight.ours])  # noqa: E731
    dtype = np.result_type(*(full[path].dtype for path in place.weight.ours))
    tensors[name] = LazyTensor(place.shape, dtype, read)
  return tensors, saved


# adapter_config.json


def _settings(
  config: ModelConfig,
  modules: Mapping[str, Place],
  ranks: Mapping[str, int],
  alphas: Mapping[str, float],
  saved: Collection[str],
  changes: Mapping[str, Change],
) -> dict[str, Any]:
  """What adapter_config.json says, but for the base.

  Args:
    modules: all that have a matrix or a scale. ranks, alphas: of those with an adapter. saved: those trained whole.
  """
  is_table = {name: place.weight.ours[0].startswith("embedding/") for name, place in modules.items()}
  shapes = param_shapes(config)
  linear = {name: modules[name] for name in ranks if name in modules and not is_table[name]}
  lying = [inputs_first(config, place, [shapes[path][-1] for path in place.weight.ours]) for place in linear.values()]
  targets = _short_names(ranks, {*modules, *ranks})
  rank, alpha = _usual(ranks.values(), 8), _usual(alphas.values(), 8)
  task: str | None = "SEQ_2_SEQ_LM" if config.architecture == "encoder_decoder" else TASKS.get(config.head, "CAUSAL_LM")
  if config.head in ("sequence", "token", "span") and not saved:
    task = None  # or PEFT wants the head's weights
  kinds = {change.magnitude is not None for change in changes.values()}
  if len(kinds) > 1:
    raise ConfigError("some modules have LoRA and others DoRA, which one adapter of PEFT's cannot have")
  return {
    "peft_type": "LORA",
    "task_type": task,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": max((change.dropout for change in changes.values()), default=0.0),
    "target_modules": sorted(set(targets.values())),
    "rank_pattern": _patterns(ranks, targets, rank),
    "alpha_pattern": _patterns(alphas, targets, alpha),
    "modules_to_save": sorted(saved) or None,
    "use_dora": kinds == {True},
    "use_rslora": False,
    "ensure_weight_tying": config.tie_embeddings and any(is_table.get(name, False) for name in (*ranks, *saved)),
    "fan_in_fan_out": bool(lying) and all(lying),
    "bias": "none",
    "init_lora_weights": True,
    "inference_mode": True,
  }


def _usual(values: Collection[Any], default: Any) -> Any:
  return collections.Counter(values).most_common(1)[0][0] if values else default


def _short_names(wanted: Collection[str], modules: Collection[str]) -> dict[str, str]:
  """What PEFT is to find each module by: its name in its layer, if that means no others; else its name."""
  found = {}
  for module in wanted:
    short = re.sub(r"^.*\.\d+\.", "", module)
    meant = [other for other in modules if ends((short,), other)]
    found[module] = short if all(other in wanted for other in meant) else module
  return found


def _patterns(values: Mapping[str, Any], targets: Mapping[str, str], usual: Any) -> dict[str, Any]:
  """rank_pattern or alpha_pattern: the values that are not the usual one."""
  found = {}
  for module, value in values.items():
    if value != usual:
      short = targets[module]
      alike = all(other == value for name, other in values.items() if ends((short,), name))
      found[short if alike else module] = value
  return found

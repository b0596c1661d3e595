"""adapter_config.json of PEFT's LoRA and DoRA adapters: which modules have which rank and scale."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

from jaxllm.base import patterns
from jaxllm.base.errors import CheckpointError, ConfigError, shown
from jaxllm.base.ranges import Range
from jaxllm.base.strangers import Count, Real, Size, declared, read_json

CONFIG_FILE = "adapter_config.json"
UNSUPPORTED = (
  "layer_replication",
  "alora_invocation_tokens",
  "use_bdlora",
  "use_qalora",
  "target_parameters",
  "arrow_config",
  "monteclora_config",
  "kasa_config",
)
KEY_START = r"(.*\.)?"  # of a key of rank_pattern and alpha_pattern, as PEFT has it
# Values of init_lora_weights, or their beginning: what is taken off the base when an adapter is opened; and what no one
# can compute from the base alone
STARTS, CHANGES_BASE = ("pissa", "olora"), ("pissa_niter_", "corda", "loftq", "lora_ga")


class Adapter(TypedDict, total=False):
  """What is read of an adapter_config.json; a null stands for the default."""

  r: Size
  lora_alpha: Real
  rank_pattern: dict[str, Size]
  alpha_pattern: dict[str, Real]
  target_modules: str | list[str]
  exclude_modules: str | list[str]
  layers_to_transform: Count | list[Count]
  layers_pattern: str | list[str]
  modules_to_save: list[str]
  trainable_token_indices: list[Count] | dict[str, list[Count]]
  use_dora: bool
  use_rslora: bool
  lora_dropout: Annotated[float, Range(0, below=1)]


def is_adapter(directory: Path) -> bool:
  """Whether an adapter stands in a directory."""
  return (directory / CONFIG_FILE).is_file()


def base_of(directory: Path) -> Path:
  """The model that an adapter belongs to; a relative path counts from here, or from the adapter.

  Raises:
    CheckpointError: adapter_config.json is damaged or names no path on this machine; or adapters have each other as
      their bases.
  """
  found, seen = _named_base(directory), {directory.resolve()}
  here = found
  while is_adapter(here):
    if here.resolve() in seen:
      raise CheckpointError(f"the adapter in {directory} has no base but adapters, of which {here} is its own")
    seen.add(here.resolve())
    here = _named_base(here)
  return found


def _named_base(directory: Path) -> Path:
  name = read_json(directory / CONFIG_FILE).get("base_model_name_or_path")
  if isinstance(name, str) and name:
    try:
      for path in (Path(name).expanduser(), directory / name):
        if path.exists() and path.resolve() != directory.resolve():
          return path
    except (OSError, RuntimeError, ValueError):
      pass  # too long, of an unknown user, or with characters that no path has
  what = "does not say what it belongs to"
  if name is not None:
    what = f"belongs to {shown(name)}, which is no path to another model here"
  raise CheckpointError(
    f"the adapter in {directory} {what}; set base_model_name_or_path in its {CONFIG_FILE} to where that model is, or "
    "name the model beside the adapter"
  )


@dataclasses.dataclass(frozen=True)
class Settings:
  """What an adapter_config.json says of a LoRA or DoRA adapter."""

  rank: int
  alpha: float
  rank_pattern: Mapping[str, int]
  alpha_pattern: Mapping[str, float]
  targets: str | tuple[str, ...] | None
  excluded: str | tuple[str, ...] | None
  layers: tuple[int, ...] | None
  layers_pattern: tuple[str, ...]
  saved: tuple[str, ...]  # modules that are trained in full
  tokens: tuple[int, ...] | Mapping[str, Sequence[int]]  # whose rows are, of the embedding or of modules by name
  dora: bool
  rslora: bool
  start: str | None  # one of STARTS
  dropout: float

  def scale_of(self, module: str) -> float:
    """What a module's product is multiplied by."""
    rank, alpha = self.rank_of(module), _of_pattern(self.alpha_pattern, module, self.alpha)
    return alpha / (math.sqrt(rank) if self.rslora else rank)

  def rank_of(self, module: str) -> int:
    return _of_pattern(self.rank_pattern, module, self.rank)

  def tokens_of(self, module: str) -> tuple[int, ...]:
    """The rows of a module that are trained alone."""
    if isinstance(self.tokens, tuple):
      return self.tokens
    return next((tuple(rows) for name, rows in self.tokens.items() if ends((name,), module)), ())

  def means(self, module: str) -> bool:
    """Whether a module is one of the targets, by PEFT's rules."""
    if self.targets is None or ends(self.excluded, module) or any(_is_part(module, name) for name in self.saved):
      return False
    if not ends(self.targets, module):
      return False
    if self.layers is None or isinstance(self.targets, str) or module in self.targets:
      return True
    numbers = (patterns.find(pattern, module, "match") for pattern in self._layer_patterns())
    number = next((number for number in numbers if number is not None), "")
    return number.isdecimal() and int(number) in self.layers

  def _layer_patterns(self) -> list[str]:
    starts = [rf"(?:^|.*?\.){pattern}\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\."]
    return [rf"{start}(\d+)\." for start in starts]

  def check_patterns(self, modules: Collection[str], here: str) -> None:
    """That its patterns can be matched against a model's modules: there are some that take longer than the universe.

    Args:
      here: what has the patterns, for the message.

    Raises:
      ConfigError: it takes too long, or more memory than there is.
    """
    tables = [_key(key) for table in (self.rank_pattern, self.alpha_pattern) for key in table]
    whole = [pattern for pattern in (self.targets, self.excluded) if isinstance(pattern, str)]
    patterns.prepare(f"{here} has a pattern that cannot be used", whole, modules)
    for_start = [*tables, *(self._layer_patterns() if self.layers_pattern else ())]
    patterns.prepare(f"{here} has a pattern that cannot be used", for_start, modules, "match")


def read_settings(directory: Path) -> tuple[dict[str, Any], Settings]:
  """adapter_config.json, as it is and as it is understood.

  Raises:
    CheckpointError: there is none, or it cannot be read.
    ConfigError: it is no LoRA, has something that cannot be expressed here, or a value of a wrong type.
  """
  if not is_adapter(directory):
    where = f"; there is one in {directory / 'adapter'}" if is_adapter(directory / "adapter") else ""
    raise CheckpointError(f"{directory} is no adapter: an adapter's directory has an {CONFIG_FILE}{where}")
  config = read_json(directory / CONFIG_FILE)
  here = f"the adapter in {directory}"
  if config.get("peft_type") != "LORA":
    raise ConfigError(f"{here} is of the kind {shown(config.get('peft_type'))}; only LORA can be read")
  for setting in UNSUPPORTED:
    if config.get(setting):
      raise ConfigError(f"{here} has {setting} = {shown(config[setting])}, which cannot be expressed here")
  init = config.get("init_lora_weights")
  if isinstance(init, str) and init.startswith(CHANGES_BASE):
    raise ConfigError(
      f"{here} has init_lora_weights = {shown(init)}, so it belongs to a base that was changed when it began; save it "
      "with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
    )

  found = declared(Adapter, config, here)
  for name in ("target_modules", "exclude_modules"):
    patterns.prepare(f"{here} has {name}", _one(found.get(name)))
  for name in ("rank_pattern", "alpha_pattern"):
    patterns.prepare(f"{here} has {name}", [p for key in found.get(name, {}) for p in (key, _key(key))])
  of_layers = found.get("layers_pattern") or ()
  of_layers = (of_layers,) if isinstance(of_layers, str) else tuple(of_layers)
  patterns.prepare(f"{here} has layers_pattern", of_layers)
  layers = found.get("layers_to_transform", ())
  tokens = found.get("trainable_token_indices", ())
  return config, Settings(
    rank=found.get("r", 8),
    alpha=found.get("lora_alpha", 8),
    rank_pattern=found.get("rank_pattern", {}),
    alpha_pattern=found.get("alpha_pattern", {}),
    targets=_names(found.get("target_modules")),
    excluded=_names(found.get("exclude_modules")) or None,
    layers=((layers,) if isinstance(layers, int) else tuple(layers)) or None,
    layers_pattern=of_layers,
    saved=tuple(found.get("modules_to_save", ())),
    tokens=tokens if isinstance(tokens, dict) else tuple(tokens),
    dora=found.get("use_dora", False),
    rslora=found.get("use_rslora", False),
    start=init if init in STARTS else None,
    dropout=found.get("lora_dropout", 0.0),
  )


def _one(pattern: str | list[str] | None) -> list[str]:
  """The pattern that a setting is; a list has names."""
  return [pattern] if isinstance(pattern, str) else []


def _names(found: str | list[str] | None) -> str | tuple[str, ...] | None:
  return tuple(found) if isinstance(found, list) else found


def listed(names: Sequence[str]) -> str:
  """A stranger's names in a message of one line: the first eight, and how many more there are."""
  more = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return ", ".join(ascii(name)[1:-1] for name in names[:8]) + more


def _key(key: str) -> str:
  """What a key of rank_pattern and alpha_pattern is as a pattern."""
  return rf"{KEY_START}({key})$"


def _of_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
  meant = (value for key, value in table.items() if patterns.find(_key(key), module, "match") is not None)
  return next(meant, default)


def ends(names: str | Collection[str] | None, module: str) -> bool:
  """Whether a module's name ends in one of some names, or is all of what a pattern means."""
  if names is None or isinstance(names, str):
    return names is not None and patterns.matches(names, module)
  return any(f".{module}".endswith(f".{name}") for name in names)


def _is_part(module: str, name: str) -> bool:
  return f".{name}." in f".{module}."

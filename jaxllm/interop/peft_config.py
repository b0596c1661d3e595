"""adapter_config.json of PEFT's LoRA and DoRA adapters: which modules have which rank and scale."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.interop.directory_files import read_json

CONFIG_FILE = "adapter_config.json"
UNSUPPORTED = (
  "layer_replication",
  "alora_invocation_tokens",
  "lora_bias",
  "use_bdlora",
  "use_qalora",
  "trainable_token_indices",
  "target_parameters",
  "arrow_config",
  "monteclora_config",
)
KEY_START = r"(.*\.)?"  # of a key of rank_pattern and alpha_pattern, as PEFT has it
PATTERN_SECONDS = 10.0
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights, or their beginning


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
    what = f"belongs to {short(name)}, which is no path to another model here"
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
  dora: bool
  rslora: bool
  tied: bool  # a tied embedding is changed as the head too
  dropout: float

  def without(self, modules: Collection[str]) -> "Settings":
    """The same without these among its targets."""
    listed = (
      self.targets
      if isinstance(self.targets, str) or self.targets is None
      else tuple(target for target in self.targets if target not in modules)
    )
    return dataclasses.replace(self, targets=listed, saved=tuple(name for name in self.saved if name not in modules))

  def scale(self, module: str, rank: int) -> float:
    """What a module's product is multiplied by."""
    alpha = _of_pattern(self.alpha_pattern, module, self.alpha)
    return alpha / (math.sqrt(rank) if self.rslora else rank)

  def rank_of(self, module: str) -> int:
    return _of_pattern(self.rank_pattern, module, self.rank)

  def means(self, module: str) -> bool:
    """Whether a module is one of the targets, by PEFT's rules."""
    if self.targets is None or ends(self.excluded, module) or any(_is_part(module, name) for name in self.saved):
      return False
    if not ends(self.targets, module):
      return False
    if self.layers is None or isinstance(self.targets, str):
      return True
    patterns = self._layer_patterns()
    found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
    return found is not None and int(found[found.re.groups]) in self.layers

  def _layer_patterns(self) -> list[str]:
    starts = [rf"(?:^|.*?\.){pattern}\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\."]
    return [rf"{start}(\d+)\." for start in starts]

  def check_patterns(self, modules: Collection[str], here: str) -> None:
    """That its patterns can be matched against a model's modules: there are some that take longer than the universe.

    A matcher cannot be stopped from within, so one of its own is tried on all of them first.

    Args:
      here: what has the patterns, for the message.

    Raises:
      ConfigError: it takes too long, or more memory than there is.
    """
    tables = [_key(key) for table in (self.rank_pattern, self.alpha_pattern) for key in table]
    whole = [pattern for pattern in (self.targets, self.excluded) if isinstance(pattern, str)]
    patterns = [*tables, *whole, *(self._layer_patterns() if self.layers_pattern else ())]
    if not any(re.search(r"[*+?{|]", pattern.removeprefix(KEY_START)) for pattern in patterns):
      return
    program = "import json, re, sys\nfor p, m in json.load(sys.stdin): re.fullmatch(p, m), re.match(p, m)"
    text = json.dumps([(pattern, module) for pattern in patterns for module in modules])
    try:
      subprocess.run(  # noqa: S603  (a program of ours; what it works on is its input)
        [sys.executable, "-I", "-c", program],
        input=text,
        text=True,
        check=True,
        timeout=PATTERN_SECONDS,
        capture_output=True,
      )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
      longest = short(max(patterns, key=len))
      raise ConfigError(f"{here} has patterns, {longest} among them, that take too long to match") from None


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
    raise ConfigError(f"{here} is of the kind {short(config.get('peft_type'))}; only LORA can be read")
  for setting in UNSUPPORTED:
    if config.get(setting):
      raise ConfigError(f"{here} has {setting} = {short(config[setting])}, which cannot be expressed here")
  init = config.get("init_lora_weights")
  if isinstance(init, str) and init.startswith(CHANGES_BASE):
    raise ConfigError(
      f"{here} has init_lora_weights = {short(init)}, so it belongs to a base that was changed when it began; save it "
      "with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
    )

  def get(name: str, fits: Callable[[Any], bool], kind: str, default: Any) -> Any:
    value = config.get(name)
    if value is None:
      return default
    if not fits(value):
      raise ConfigError(f"{here} has {name} = {short(value)}; it should be {kind}")
    return value

  def numbers(name: str, fits: Callable[[Any], bool], kind: str) -> Any:
    of_each = lambda value: isinstance(value, dict) and all(map(fits, value.values()))  # noqa: E731
    found = get(name, of_each, f"a table of patterns, each with {kind}", {})
    for pattern in found:
      _compiled(pattern, f"{here} has {name}", _key(pattern))
    return found

  def names(name: str) -> Any:
    found = get(name, lambda v: isinstance(v, str) or _all(str, v), "a name, a list of them, or a pattern", None)
    if isinstance(found, str):
      _compiled(found, f"{here} has {name}")
    return found if found is None or isinstance(found, str) else tuple(found)

  truth = lambda name: get(name, lambda v: isinstance(v, bool), "true or false", False)  # noqa: E731
  is_rank = lambda v: isinstance(v, int) and not isinstance(v, bool) and 0 < v < 2**31  # noqa: E731
  is_number = lambda v: isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30  # noqa: E731
  layers = get("layers_to_transform", lambda v: isinstance(v, int) or _all(int, v), "layers' numbers", ())
  patterns = names("layers_pattern") or ()
  for pattern in patterns:
    _compiled(pattern, f"{here} has layers_pattern")
  return config, Settings(
    rank=get("r", is_rank, "a positive whole number", 8),
    alpha=get("lora_alpha", is_number, "a number", 8),
    rank_pattern=numbers("rank_pattern", is_rank, "a positive whole number"),
    alpha_pattern=numbers("alpha_pattern", is_number, "a number"),
    targets=names("target_modules"),
    excluded=names("exclude_modules") or None,
    layers=((layers,) if isinstance(layers, int) else tuple(layers)) or None,
    layers_pattern=(patterns,) if isinstance(patterns, str) else patterns,
    saved=tuple(get("modules_to_save", lambda v: _all(str, v), "a list of names", ())),
    dora=truth("use_dora"),
    rslora=truth("use_rslora"),
    tied=truth("ensure_weight_tying"),
    dropout=get("lora_dropout", lambda v: is_number(v) and 0 <= v < 1, "at least 0 and below 1", 0.0),
  )


def _all(kind: type, value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _compiled(pattern: str, what: str, whole: str | None = None) -> None:
  try:
    re.compile(pattern)
    re.compile(whole or pattern)
  except (re.error, RecursionError, OverflowError) as error:
    reason = short(str(error))[1:-1]
    raise ConfigError(f"{what} = {short(pattern)}, which is no regular expression: {reason}") from None


def short(value: Any) -> str:
  """A stranger's value in a message of one line."""
  text = ascii(value)
  return text if len(text) <= 60 else text[:57] + "..."


def listed(names: Sequence[str]) -> str:
  """A stranger's names in a message of one line: the first eight, and how many more there are."""
  more = f" and {len(names) - 8} more" if len(names) > 8 else ""
  return ", ".join(ascii(name)[1:-1] for name in names[:8]) + more


def _key(key: str) -> str:
  """What a key of rank_pattern and alpha_pattern is as a pattern."""
  return rf"{KEY_START}({key})$"


def _of_pattern(table: Mapping[str, Any], module: str, default: Any) -> Any:
  return next((value for key, value in table.items() if re.match(_key(key), module)), default)


def ends(names: str | Collection[str] | None, module: str) -> bool:
  """Whether a module's name ends in one of some names, or is all of what a pattern means."""
  if names is None or isinstance(names, str):
    return names is not None and re.fullmatch(names, module) is not None
  return any(f".{module}".endswith(f".{name}") for name in names)


def _is_part(module: str, name: str) -> bool:
  return f".{name}." in f".{module}."

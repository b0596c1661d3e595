"""Where a run's models come from before its first step: fresh weights, or files, after maps over them."""

import dataclasses
import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.base import digests
from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import local_path
from jaxllm.base.settings import from_mapping
from jaxllm.data.config import DataConfig, TokenizerConfig
from jaxllm.interop.adapter import StoredAdapter
from jaxllm.interop.directory_files import START, START_ADAPTER, START_FILE
from jaxllm.interop.fingerprint import fingerprint
from jaxllm.interop.open import form_of, open_model, with_adapter
from jaxllm.interop.peft_config import read_settings
from jaxllm.interop.stored import StoredModel
from jaxllm.interop.tensors import LazyTensor
from jaxllm.models.adapters import is_place
from jaxllm.models.build import Params, declare
from jaxllm.models.config import ModelConfig
from jaxllm.models.lora import LoraWeight
from jaxllm.models.quantization import quantize_matrix
from jaxllm.models.weights import is_adapted, map_weights_with_path
from jaxllm.parallel.agreement import first_does, together
from jaxllm.peft.base import Parts, has, module_of
from jaxllm.peft.lora import Lora, principal
from jaxllm.storage.checkpoints import Checkpoints
from jaxllm.storage.config import CheckpointConfig
from jaxllm.storage.reading import committed_steps, open_params
from jaxllm.training.config import ModelInitConfig, RunConfig
from jaxllm.training.new_tokens import grown, grown_tokenizer, trains_new_tokens

logger = logging.getLogger("jaxllm")
POLICY, ADAPTER = "policy", "adapter"
Loaded = dict[str, dict[str, Any]]  # model name -> path of a parameter -> its weight; of ADAPTER, parts of one


@dataclasses.dataclass(frozen=True)
class Start:
  """The models in files that a run begins with; none of their weights is in memory.

  policy: what is trained, None: fresh weights. teachers: the objective's other models that have files, by name.
  adapter: what is trained beside the policy, of peft.path.
  """

  config: ModelInitConfig = ModelInitConfig()
  policy: StoredModel | None = None
  teachers: Mapping[str, StoredModel] = dataclasses.field(default_factory=dict)
  adapter: StoredAdapter | None = None

  @property
  def others(self) -> dict[str, ModelConfig]:
    """What the other models are."""
    return {name: stored.config for name, stored in self.teachers.items()}

  def with_stored_dtypes(self, shapes: Params) -> Params:
    """The shapes of the policy's parameters, in the dtypes in which files have them."""
    tensors = {} if self.policy is None else self.policy.tensors

    def one(path, leaf):
      return jax.ShapeDtypeStruct(leaf.shape, tensors[path].dtype) if path in tensors else leaf

    return map_weights_with_path(one, shapes)

  def quantize(self, params: Params, leave: Callable[[str], bool] = lambda path: False) -> Params:
    """The policy's parameters with quantized weights where the config wants them.

    Args:
      leave: paths of those that stay as they are, because they are trained.
    """
    one = lambda path, w: w if leave(path) or self.is_fresh(path) else _rounded(path, w, self.config)  # noqa: E731
    return map_weights_with_path(one, params)

  @property
  def adapter_shapes(self) -> dict[str, Parts]:
    """What is read of `adapter`, by path of a parameter."""
    changes = {} if self.adapter is None else self.adapter.changes
    shape = lambda tensor: jax.ShapeDtypeStruct(tensor.shape, jnp.float32)  # noqa: E731
    return {path: {name: shape(part) for name, part in change.parts.items()} for path, change in changes.items()}

  def with_adapter(self, params: Params, parts: Mapping[str, Parts]) -> Params:
    """The policy's parameters with those of `adapter` over them."""
    changes = self.adapter.changes
    return map_weights_with_path(lambda path, w: changes[path].over(w, parts[path]) if path in changes else w, params)

  def filled(self, fresh: Params, loaded: Mapping[str, Any]) -> Params:
    """Fresh parameters, in the place of those that were loaded these."""
    return map_weights_with_path(lambda path, w: loaded.get(path, w), fresh)

  def is_fresh(self, path: str) -> bool:
    """Whether the files leave out a parameter of the policy: a new head, which is trained in any case."""
    return self.policy is not None and path not in self.policy.tensors

  def teacher_shapes(self, name: str) -> Params:
    """The shapes of another model's parameters, in the dtypes in which files have them."""
    stored = self.teachers[name]
    one = lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, stored.tensors[path].dtype)  # noqa: E731
    return map_weights_with_path(one, declare(stored.config)[1])

  def from_files(
    self,
    began: Params,
    teachers: Mapping[str, Params],
    keep_fresh: bool,
    adapted: Params,
    keeps: Callable[[str], bool],
  ) -> Loaded:
    """What a run begins with and does not draw at each start: what is in files.

    Args:
      began: the policy's parameters before adapters. teachers: the other models'.
      keep_fresh: fresh weights are kept in files too, because checkpoints will not have all of them.
      adapted: the policy's parameters. keeps: of which the adapter is kept in files (`Peft.keeps`).
    """
    own = _by_path(began)
    if self.policy is not None:
      own = {path: leaf for path, leaf in own.items() if path in self.policy.tensors}
    elif not keep_fresh:
      own = {}
    read, parts = self.adapter_shapes, {}
    for path, w in _by_path(adapted).items():
      names = read[path] if path in read else ("a", "b") if keeps(path) and is_adapted(w) else ()
      if names:
        parts[path] = {name: getattr(w, name) for name in names}
    found = {POLICY: own} | {name: _by_path(params) for name, params in teachers.items()}
    return found | ({ADAPTER: parts} if parts else {})

  def load(self, wanted: Loaded) -> Loaded:
    """The arrays of `wanted`, which is what `from_files` gives, on their devices."""
    stored = {POLICY: self.policy, **self.teachers}
    loaded: Loaded = {}
    for name in wanted.keys() - {ADAPTER}:
      loaded[name] = {path: self._read(stored[name], path, leaf) for path, leaf in wanted[name].items()}
    if self.adapter is not None:
      of = self.adapter.changes
      loaded[ADAPTER] = {path: _put(of[path].parts, parts) for path, parts in wanted[ADAPTER].items()}
    return loaded

  def _read(self, stored: StoredModel, path: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
      return stored.array(path, leaf.sharding)
    shardings = jax.tree.map(lambda part: part.sharding, leaf)
    codes = jax.tree.leaves(shardings)[0]  # which lie transposed
    *lead, outputs, inputs = (*codes.spec, *[None] * (len(leaf.shape) - len(codes.spec)))
    plain = stored.array(path, NamedSharding(codes.mesh, PartitionSpec(*lead, inputs, outputs)))
    return jax.jit(lambda w: _rounded(path, w, self.config), out_shardings=shardings)(plain)


def open_start(run: RunConfig, directory: Path) -> tuple[RunConfig, Start]:
  """Opens the models that a run begins with; all processes call it.

  Args:
    directory: the run's, which may not be there yet. One whose checkpoints have all weights needs its policy's files
      no more.

  Returns:
    The config with what the policy's files say of model, tokenizer and data, where it says nothing itself; and the
    models.

  Raises:
    CheckpointError: one is missing or damaged. ConfigError: it is another model than the config says.
  """
  config, policy, adapter = run.model_init, None, None
  before = _config_before(directory)
  if config.path and before.get("model_init", {}).get("path") == config.path and config.step is None:
    config = dataclasses.replace(config, step=before["model_init"]["step"])
  if config.path and not (directory / START_FILE).exists() and committed_steps(directory / "checkpoints"):
    groups = {name: from_mapping(type(getattr(run, name)), before[name]) for name in ("model", "data")}
    run = dataclasses.replace(run, model_init=config, **groups)
    run.check()
  elif config.path:
    config = _settled(config)
    policy = _open(config.path, adapter=config.adapter or None, step=config.step)
    if path := getattr(run.peft, "path", ""):
      policy, adapter = _open_adapter(policy, path)
      run = dataclasses.replace(run, peft=_as_stored(run.peft, adapter, policy.tensors))
    data = run.data
    if data == DataConfig() and "data" in policy.run:
      data = from_mapping(DataConfig, policy.run["data"])
    run = with_tokenizer(dataclasses.replace(run, model_init=config, data=data))
    model = _with_changes(policy, run.model)
    if config.new_tokens:
      policy = grown(policy, config.new_tokens, Path(run.data.tokenizer.path), model.vocab_size)
      model = dataclasses.replace(model, vocab_size=policy.config.vocab_size)
      run = trains_new_tokens(run, model, () if adapter is None else adapter.changes)
    run = dataclasses.replace(run, model=model)
    policy = _without_other_head(policy, run.model)
    run.check()
    _check_fits(run.model, policy)
  paths = {name: getattr(run.objective, name, "") for name in run.objective.others}
  return run, Start(config, policy, {name: _open(path) for name, path in paths.items() if path}, adapter)


def _open(path: str, **options: Any) -> StoredModel:
  """`open_model` by all processes: where a file is missing or damaged for one of them, it fails on all."""
  with together():
    form = form_of(local_path(path))
  if form in ("run", "adapter"):  # reading checkpoints, they agree on what they find
    return open_model(path, **options)
  with together():
    return open_model(path, **options)


def _open_adapter(policy: StoredModel, path: str) -> tuple[StoredModel, StoredAdapter]:
  """The policy as an adapter in files wants it, and the adapter; by all processes."""
  with together():
    model = with_adapter(policy, local_path(path))
  return dataclasses.replace(model, apart=model.apart[:-1], run=policy.run), model.apart[-1]


def _as_stored(peft: Lora, adapter: StoredAdapter, paths: Collection[str]) -> Lora:
  """The settings of an adapter in files, with what the config says of how it is trained.

  Args:
    paths: of all parameters.

  Raises:
    ConfigError: the config says that it is another, or it has parameters of some layers whole, which are trained in
      all of them or in none.
  """
  if peft.kind != adapter.kind:
    raise ConfigError(f"peft.kind is {peft.kind!r}, but the adapter at peft.path {peft.path} is {adapter.kind!r}")
  if adapter.partly:
    raise ConfigError(
      f"the adapter at peft.path {peft.path} has {', '.join(adapter.partly)} whole in some of the layers: it can be "
      "used or merged, but not trained here"
    )
  _, settings = read_settings(Path(peft.path).expanduser())
  own: dict[str, Any] = {"rank": settings.rank, "alpha": float(settings.alpha), "rslora": settings.rslora}
  own |= {"exclude": (), "rank_pattern": {}, "alpha_pattern": {}}  # they are in the weights
  own["targets"] = tuple(sorted(str(module_of(path)) for path in adapter.changes))
  own["modules_to_save"] = tuple(sorted({_meaning(path, adapter.full, paths) for path in adapter.full}))
  for field in dataclasses.fields(peft):
    if field.name in own and getattr(peft, field.name) not in (_default(field), own[field.name]):
      raise ConfigError(
        f"peft.{field.name} is {getattr(peft, field.name)!r}, but that of the adapter at peft.path {peft.path} is "
        f"{own[field.name]!r}; leave it to the adapter"
      )
  return dataclasses.replace(peft, dropout=peft.dropout or settings.dropout, **own)


def _meaning(path: str, wanted: Collection[str], paths: Collection[str]) -> str:
  """What in peft.modules_to_save means a parameter: its module, if all that this means is wanted; else it alone."""
  names = path.rpartition("/")[0], path
  means = lambda name: {other for other in paths if has(name, other)}  # noqa: E731
  return next((name for name in names if name and means(name) <= set(wanted)), "^" + re.escape(path))


def _default(field: dataclasses.Field) -> Any:
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def with_tokenizer(run: RunConfig) -> RunConfig:
  """The config with the tokenizer of the model that the run begins with, unless it names one, and new tokens in it.

  One that is inside a file, or has new tokens, is written into a folder beside the prepared data, once.
  """
  run = _with_own_tokenizer(run)
  if not run.model_init.new_tokens:
    return run
  path = grown_tokenizer(run.data.tokenizer.path, run.model_init.new_tokens, Path(run.data.dir))
  return dataclasses.replace(run, data=dataclasses.replace(run.data, tokenizer=TokenizerConfig(path=str(path))))


def _with_own_tokenizer(run: RunConfig) -> RunConfig:
  path, named = Path(run.model_init.path).expanduser(), run.data.tokenizer
  trained = run.model_init.new_tokens and not named.path  # new tokens join what the model was trained with
  if not run.model_init.path or (named != TokenizerConfig() and not trained):
    return run
  tokenizer = path / "tokenizer" if (path / "checkpoints").is_dir() else path
  if path.is_file():
    tokenizer = Path(run.data.dir) / f"tokenizer-of-{path.stem}"
    inside = open_model(path).tokenizer
    if inside is None:
      raise ConfigError(f"{path} has no tokenizer; set data.tokenizer.path")
    first_does(lambda: None if tokenizer.exists() else inside.save(tokenizer))
  data = dataclasses.replace(run.data, tokenizer=TokenizerConfig(path=str(tokenizer)))
  return dataclasses.replace(run, data=data)


def _config_before(directory: Path) -> dict[str, Any]:
  """The config with which a run directory was begun; {}: it was not."""
  try:
    return json.loads((directory / "config.json").read_text())
  except (OSError, ValueError):
    return {}  # opening the directory will say what is wrong


def _with_changes(stored: StoredModel, wanted: ModelConfig) -> ModelConfig:
  """What a model in files is, with the settings in which `wanted` differs from the defaults."""
  names = [field.name for field in dataclasses.fields(ModelConfig)]
  changed = {name: getattr(wanted, name) for name in names if getattr(wanted, name) != getattr(ModelConfig(), name)}
  there = {name: getattr(stored.config, name) for name in changed}
  if other := [
    f"model.{name} is {changed[name]!r}, not {there[name]!r}"
    for name in names
    if name in changed and changed[name] != there[name]
  ]:
    logger.info("the config changes what the model in %s is: %s", stored.path, ", ".join(other))
  return dataclasses.replace(stored.config, **changed)


def _without_other_head(stored: StoredModel, model: ModelConfig) -> StoredModel:
  """The model without its head, where the config wants a head of another kind, which is fresh then."""
  if stored.config.head == model.head:
    return stored
  kept = {path: tensor for path, tensor in stored.tensors.items() if not path.startswith("head/")}
  if dropped := sorted(stored.tensors.keys() - kept.keys()):
    logger.info(
      "model.head is %r, so what %s has of another head goes: %s", model.head, stored.path, ", ".join(dropped)
    )
  return dataclasses.replace(stored, tensors=kept)


def _check_fits(model: ModelConfig, stored: StoredModel) -> None:
  """That the files have every parameter but those of a new head and of adapters' places."""
  shapes = {path: leaf.shape for path, leaf in _by_path(declare(model)[1]).items()}
  for path, shape in shapes.items():
    found = stored.tensors[path].shape if path in stored.tensors else None
    if found is None and not path.startswith("head/") and not is_place(path):
      raise ConfigError(f"model_init.path {stored.path} has no {path}, which the config's model has")
    if found is not None and found != shape:
      raise ConfigError(
        f"model_init.path {stored.path} has {path} of shape {found}, but the config's model wants {shape}; leave the "
        "sizes under model to it"
      )
  if fresh := [path for path in shapes if path not in stored.tensors]:
    logger.info("fresh weights, which %s has not: %s", stored.path, ", ".join(fresh))
  if unused := sorted(stored.tensors.keys() - shapes.keys()):
    logger.info("weights of %s that this model does not use: %s", stored.path, ", ".join(unused))


def start_record(start: Start, params: Params) -> dict[str, Any]:
  """What start.json says of the weights that a run's checkpoints leave out.

  Args:
    params: all parameters of the policy, with adapters.
  """
  config, scales = start.config, {}

  def note(path, w):
    if isinstance(w, LoraWeight):
      each = None if start.adapter is None else start.adapter.changes[path].scales.tolist()
      scales[path] = w.scale if w.scales is None else each

  map_weights_with_path(note, params)
  rounding = {name: getattr(config, name) for name in ("quantize", "group_size", "double_quantize")}
  record: dict[str, Any] = {"scales": scales, **rounding, "new_tokens": list(config.new_tokens)}
  if start.policy is None:
    return record | {"path": START}
  record |= {"step": config.step, "adapter": config.adapter or None, "peft": None}
  paths = {"": config.path, "adapter_": config.adapter, "peft_": "" if start.adapter is None else start.adapter.path}
  for name, path in paths.items():
    if path:
      place = Path(path).expanduser().absolute()
      digest = fingerprint(place, config.step, alone=bool(name))
      record |= {name + "digest": digest, name.removesuffix("_") or "path": str(place)}
  return record


def keep_record(directory: Path, record: dict[str, Any]) -> None:
  """Writes start.json, or checks that it says the same; the first process calls it.

  Raises:
    CheckpointError: the weights that the run began with are not what they were.
  """
  file = directory / START_FILE
  if not file.exists():
    digests.record(directory, {START_FILE: (json.dumps(record, indent=2) + "\n").encode()})
    return
  before, now = json.loads(file.read_text()), json.loads(json.dumps(record))
  if changed := next((key for key in before if before[key] != now.get(key)), None):
    raise CheckpointError(
      f"{directory} began with {before.get('path')}, whose {changed} was {before.get(changed)!r} and is now "
      f"{record.get(changed)!r}; put back what was there, or choose another --workdir"
    )


def _settled(config: ModelInitConfig) -> ModelInitConfig:
  """The config with the step that "latest" means now, so that a resumed run begins with the same weights."""
  if config.path and config.step is None and (Path(config.path).expanduser() / "checkpoints").is_dir():
    steps = first_does(lambda: committed_steps(Path(config.path).expanduser() / "checkpoints"))
    return dataclasses.replace(config, step=max(steps, default=None))
  return config


def begun(directory: Path, start: Start, program_loaded: Loaded, fresh: Callable[[], Params]) -> Loaded:
  """The arrays that a run begins with, on their devices; all processes call it.

  Args:
    directory: the run's. A run that has no model to begin with and does not train all of it keeps its fresh weights
      there, once.
    program_loaded: what is wanted. fresh: draws the policy's parameters.
  """
  if start.policy is None and program_loaded[POLICY]:
    with Checkpoints(directory / START, CheckpointConfig()) as checkpoints:
      if checkpoints.latest_step() is None:
        checkpoints.save(0, {"params": fresh()})
    tensors = {name: LazyTensor(*array) for name, array in open_params(directory / START, 0).items()}
    start = dataclasses.replace(start, policy=StoredModel(ModelConfig(), tensors))
  loaded = start.load(program_loaded)
  if ADAPTER in program_loaded and start.adapter is None:
    loaded[ADAPTER] = _principal(directory / START_ADAPTER, program_loaded[ADAPTER], loaded[POLICY])
  return loaded


def _principal(directory: Path, wanted: dict[str, Parts], base: dict[str, Any]) -> dict[str, Parts]:
  """What adapters begin with whose singular values are computed once and kept, on its devices.

  Args:
    wanted: ShapeDtypeStructs with shardings. base: the policy's parameters by path.
  """
  with Checkpoints(directory, CheckpointConfig()) as checkpoints:
    if checkpoints.latest_step() is None:
      found = {}
      for path, parts in wanted.items():
        largest = functools.partial(principal, rank=parts["a"].shape[-1])
        where = tuple(parts[name].sharding for name in ("a", "b"))
        found[path] = dict(zip(("a", "b"), jax.jit(largest, out_shardings=where)(base[path])))
      checkpoints.save(0, {"params": traverse_util.unflatten_dict(found, sep="/")})
  stored = open_params(directory, 0)
  each = {path: {name: LazyTensor(*stored[f"{path}/{name}"]) for name in parts} for path, parts in wanted.items()}
  return {path: _put(each[path], parts) for path, parts in wanted.items()}


def _put(parts: Mapping[str, LazyTensor], wanted: Parts) -> Parts:
  """Parts of an adapter on their devices, in float32."""

  def one(name: str) -> jax.Array:
    x = np.asarray(parts[name].read(), np.float32)
    return jax.make_array_from_callback(x.shape, wanted[name].sharding, lambda index: x[index])

  return {name: one(name) for name in wanted}


def _by_path(params: Params) -> dict[str, Any]:
  return traverse_util.flatten_dict(params, sep="/")


def _rounded(path: str, w: Any, config: ModelInitConfig) -> Any:
  return quantize_matrix(path, w, config.quantize, config.group_size, config.double_quantize)

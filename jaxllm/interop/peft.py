"""PEFT's LoRA and DoRA adapters, read: their modules as our parameters."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from jaxllm.base.errors import CheckpointError, shown
from jaxllm.interop.adapter import Change, StoredAdapter
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.families.table import Family
from jaxllm.interop.huggingface import Place, places
from jaxllm.interop.peft_config import CONFIG_FILE, Settings, ends, listed, read_settings
from jaxllm.interop.pickled import read_pickled
from jaxllm.interop.safetensors import read_safetensors
from jaxllm.interop.stored import param_shapes
from jaxllm.interop.tensors import Index, LazyTensor, Tensors, from_parts
from jaxllm.models.config import ModelConfig

WEIGHTS_FILE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# The endings of a module's factors A [r, inputs] and B [outputs, r], and of DoRA's magnitude [outputs]
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
ROWS = ".token_adapter.trainable_tokens_delta"  # of a table, which are trained without the others


def read_weights(directory: Path) -> dict[str, LazyTensor]:
  """The tensors of an adapter without PEFT's prefix, none of them read.

  Raises:
    CheckpointError: they are missing or damaged.
  """
  for file, read in ((WEIGHTS_FILE, read_safetensors), (PICKLE, read_pickled)):
    if (directory / file).is_file():
      return {name.removeprefix(PREFIX): tensor for name, tensor in read(directory / file).items()}
  raise CheckpointError(f"{directory} has no weights: there is neither {WEIGHTS_FILE} nor {PICKLE}")


@dataclasses.dataclass(frozen=True)
class _Found:
  """The tensors of an adapter: the factors of each module, by their endings; of modules that are saved whole; and rows
  of a table, by its module."""

  modules: Mapping[str, Mapping[str, LazyTensor]]
  full: Tensors
  rows: Tensors

  @classmethod
  def of(cls, tensors: Tensors) -> "_Found":
    modules: dict[str, dict[str, LazyTensor]] = {}
    full, rows = {}, {}
    for name, tensor in tensors.items():
      name = name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name
      ending = next((end for end in (*LINEAR, *EMBEDDING, MAGNITUDE) if name.endswith(end)), None)
      if ending:
        modules.setdefault(name.removesuffix(ending), {})[ending] = tensor
      elif name.endswith(ROWS):
        rows[name.removesuffix(ROWS)] = tensor
      elif not any(part in name for part in (".original_module.", ".trainable_tokens_original")):  # as it was before
        full[re.sub(r"\.(token_adapter|base_layer|modules_to_save)(?=\.)", "", name)] = tensor
    return cls(modules, full, rows)

  def without(self, modules: Collection[str]) -> "_Found":
    """The same but for these modules."""
    keep = lambda tensors: {name: t for name, t in tensors.items() if name.removesuffix(".weight") not in modules}  # noqa: E731
    return _Found(keep(self.modules), keep(self.full), keep(self.rows))


def changes_tied_table(directory: Path, family: str) -> bool:
  """Whether an adapter changes the embedding or the head alone, of a model that has one matrix for both."""
  config, settings = read_settings(directory)
  if settings.tied:
    return False
  found = _Found.of(read_weights(directory))
  own = FAMILIES[family]
  tied = {_table(own).removesuffix(".weight"), own.head.removesuffix(".weight")}
  of_head = [name for name in found.rows if ends((own.head.removesuffix(".weight"),), name)]  # else both have them
  names = {*found.modules, *of_head, *(name.removesuffix(".weight") for name in found.full)}
  return any(own.prefix + name in tied or name in tied for name in names)


def vocabulary_of(directory: Path, family: str) -> int | None:
  """The rows of the embedding that an adapter has whole, as one with new tokens does; None: it has none."""
  full = _Found.of(read_weights(directory)).full
  own = FAMILIES[family]
  table = full.get(_table(own)) or full.get(_table(own).removeprefix(own.prefix))
  return table.shape[0] if table is not None and len(table.shape) == 2 else None


def _table(family: Family) -> str:
  return next(weight.theirs for weight in family.weights if weight.ours == ("embedding/tokens",))


def open_adapter(directory: Path, config: ModelConfig, tensors: Tensors, families: Sequence[str]) -> StoredAdapter:
  """The adapter in a directory, for a model with these parameters.

  Args:
    families: by whose names of modules it may have been trained; the first that knows all of them is taken.

  Raises:
    ConfigError: see `read_settings`. CheckpointError: its weights are missing, damaged, or are not those that its
      config and the model call for; the message lists them.
  """
  raw, settings = read_settings(directory)
  found = _Found.of(read_weights(directory))
  if found == _Found({}, {}, {}):
    raise CheckpointError(f"the adapter in {directory} has no tensors")
  if settings.tied and config.tie_embeddings:  # the head's copies of what changes the embedding
    head = {FAMILIES[family].head.removesuffix(".weight") for family in families}
    found, settings = found.without(head), settings.without(head)
  modules, full = found.modules, dict(found.full)
  wanted = [*(f"{name}.weight" for name in (*modules, *found.rows)), *full]
  fewest: list[str] | None = None
  for family in families:
    known, names = places(config, family, wanted)
    unknown = [name for name in wanted if names[name] not in known]
    if not unknown:
      break
    fewest = min(fewest or unknown, unknown, key=len)
  else:
    lacking = [name.removesuffix(".weight") for name in fewest or wanted]
    raise CheckpointError(f"the adapter in {directory} does not fit its base model, which has no {listed(lacking)}")
  ours = {names[f"{name}.weight"].removesuffix(".weight"): parts for name, parts in modules.items()}
  settings.check_patterns({name.rpartition(".")[0] for name in known}, f"the adapter in {directory}")
  _check_targets(directory, settings, ours, known, {names[name] for name in full})
  for module, rows in found.rows.items():
    name, tokens = f"{module}.weight", settings.tokens_of(module)
    check = functools.partial(_fits, directory, module)
    full[name] = _with_rows(config, tensors, known[names[name]], full.get(name), rows, tokens, check)
  shapes = param_shapes(config)
  pieces: dict[str, dict[Index, _Piece]] = {}
  for module, parts in ours.items():
    place = known[f"{module}.weight"]
    for path, piece in _pieces(directory, config, settings, shapes, module, parts, place):
      pieces.setdefault(path, {})[place.at] = piece
  changes = {path: _stacked(shapes[path], each, settings.dropout) for path, each in pieces.items()}
  replaced: dict[str, dict[Index, LazyTensor]] = {}
  for name, tensor in full.items():
    place = known[names[name]]
    if tensor.shape != place.shape:
      raise CheckpointError(
        f"the adapter in {directory} does not fit its base model: {name} has shape {tensor.shape}, there it is "
        f"{place.shape}"
      )
    own = [shapes[path][len(place.at) :] for path in place.weight.ours]
    for i, path in enumerate(place.weight.ours):
      read = lambda t=tensor, w=place.weight, parts=own, i=i: w.transform.read(config, t.read(), parts)[i]  # noqa: E731
      replaced.setdefault(path, {})[place.at] = LazyTensor(own[i], tensor.dtype, read)
  copies = {path for name in full if name.removesuffix(".weight") in modules for path in known[names[name]].weight.ours}
  whole = {path: _replaced(tensors[path], each) for path, each in replaced.items()}
  whole = {path: new for path, new in whole.items() if not (path in copies and _same(new, tensors[path]))}
  partly = sorted(p for p, each in replaced.items() if len(each) < math.prod(shapes[p][: len(next(iter(each)))]))
  return StoredAdapter(raw, changes, whole, directory, tuple(partly))


def _check_targets(
  directory: Path,
  settings: Settings,
  modules: Mapping[str, Mapping[str, LazyTensor]],
  known: Mapping[str, Place],
  full: Collection[str],
) -> None:
  """That the weights are those of the modules that the config names, all of them and no others."""
  if isinstance(settings.targets, str) and settings.targets.lower() == "all-linear":
    return
  matrices = {name.removesuffix(".weight"): place for name, place in known.items() if name.endswith(".weight")}
  tables = tuple(place for place in matrices.values() if place.weight.ours[0].startswith("embedding/"))
  extra = [m for m in modules if settings.targets is not None and not settings.means(m) and matrices[m] not in tables]
  if extra:
    raise CheckpointError(
      f"the adapter in {directory} has weights of {listed(extra)}, which its target_modules do not name"
    )
  of_layers = [
    m for m, p in matrices.items() if p.weight.ours[0].endswith("/weight") and "/moe/" not in p.weight.ours[0]
  ]
  missing = [m for m in of_layers if settings.means(m) and m not in modules]
  saved = [name for name in known if name.endswith(".weight") and ends(settings.saved, name.removesuffix(".weight"))]
  missing += [name for name in saved if name not in full]
  if missing:
    raise CheckpointError(
      f"the adapter in {directory} lacks the weights of {listed(missing)}, which its {CONFIG_FILE} names"
    )
  for target in settings.targets if isinstance(settings.targets, tuple) else ():
    named = [module for module in {*matrices, *modules} if ends((target,), module)]
    if not set(named) & set(modules) and not (named and all(ends(settings.excluded, module) for module in named)):
      raise CheckpointError(f"the adapter in {directory} has no weights of {shown(target)}, one of its target_modules")


def _fits(directory: Path, module: str, holds: bool, problem: str) -> None:
  if not holds:
    raise CheckpointError(f"the adapter in {directory} does not fit its base model: {module} {problem}")


def _with_rows(
  config: ModelConfig,
  tensors: Tensors,
  place: Place,
  whole: LazyTensor | None,
  rows: LazyTensor,
  tokens: Sequence[int],
  check: Callable[[bool, str], None],
) -> LazyTensor:
  """Their tensor of a table with some rows replaced; `whole`: the adapter's own table, else it is the base's."""
  wanted = (len(tokens), place.shape[-1])
  check(len(place.shape) == 2, "is no table of tokens")
  check(rows.shape == wanted, f"has rows of shape {rows.shape}, but {wanted} are called for")
  check(max(tokens, default=0) < place.shape[0], f"has no token {max(tokens, default=0)}, whose row was trained")
  dtype = np.result_type(rows.dtype, *(tensors[path].dtype for path in place.weight.ours))

  def read() -> np.ndarray:
    own = [tensors[path].part(place.at) for path in place.weight.ours]
    table = (place.weight.transform.write(config, own) if whole is None else whole.read()).astype(dtype)
    table[list(tokens)] = rows.read()
    return table

  return LazyTensor(place.shape, dtype, read)


# Factors


@dataclasses.dataclass(frozen=True)
class _Piece:
  """The change of one matrix of a stack."""

  a: Callable[[], np.ndarray]  # [I, r]
  b: Callable[[], np.ndarray]  # [r, O]
  magnitude: Callable[[], np.ndarray] | None  # [O]
  rank: int
  scale: float


def inputs_first(config: ModelConfig, place: Place, outputs: Sequence[int]) -> bool:
  """Whether their tensor of a matrix is [inputs, outputs], as ours are."""
  blanks = [np.broadcast_to(np.int8(0), (1, count)) for count in outputs]
  return place.weight.transform.write(config, blanks).shape[0] == 1


def _pieces(directory, config, settings, shapes, module, parts, place) -> Iterator[tuple[str, _Piece]]:
  """(parameter, its change) of a module: of a fused one, several, each with all of A and its own columns of B."""
  check = functools.partial(_fits, directory, module)
  first, second = EMBEDDING if EMBEDDING[0] in parts else LINEAR
  check(first in parts and second in parts, f"lacks {first if first not in parts else second}")
  check((MAGNITUDE in parts) == settings.dora, f"{'lacks' if settings.dora else 'has'} a magnitude")
  A, B = parts[first], parts[second]
  ours = [shapes[path][len(place.at) :] for path in place.weight.ours]
  check(all(len(shape) == 2 for shape in ours), "is no matrix")
  table = place.weight.ours[0].startswith("embedding/")
  check(table == (first == EMBEDDING[0]), f"has {first}, which {'is not' if table else 'is'} an embedding's")
  inputs, outputs = ours[0][0], [shape[1] for shape in ours]
  rank = settings.rank_of(module)
  for name, tensor, shape in ((first, A, (rank, inputs)), (second, B, (sum(outputs), rank))):
    check(tensor.shape == shape, f"has {name[1:]} of shape {tensor.shape}, but {shape} are called for")
  lying = inputs_first(config, place, outputs)

  def columns(tensor: LazyTensor, i: int) -> np.ndarray:
    x = tensor.read()
    rows = [shape if x.ndim == 1 else (rank, shape) for shape in outputs]
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    return place.weight.transform.read(config, x.T if x.ndim > 1 and lying else x, rows)[i]

  magnitude = parts.get(MAGNITUDE)
  if magnitude is not None:
    wanted = (sum(outputs),)
    check(magnitude.shape in (wanted, (1, *wanted)), f"has a magnitude of shape {magnitude.shape}, not {wanted}")
    flat = magnitude.read
    magnitude = LazyTensor(wanted, magnitude.dtype, lambda: flat().reshape(-1))
  for i, path in enumerate(place.weight.ours):
    lengths = None if magnitude is None else (lambda i=i, m=magnitude: columns(m, i))
    yield (
      path,
      _Piece(lambda: A.read().T, lambda i=i: columns(B, i), lengths, rank, settings.scale(module, rank)),
    )


def _stacked(shape: tuple[int, ...], pieces: Mapping[Index, _Piece], dropout: float) -> Change:
  """The changes of a stack's matrices as one, with zeros where there is none and past smaller ranks."""
  *lead, inputs, outputs = shape
  rank = max(piece.rank for piece in pieces.values())
  scales, where = np.ones(lead), np.zeros(lead, bool)
  for index, piece in pieces.items():
    scales[index], where[index] = piece.scale, True

  def tensor(name: str, of_matrix: tuple[int, ...]) -> LazyTensor:
    def part(index: Index) -> np.ndarray:
      whole = np.zeros(of_matrix, np.float32)
      if index in pieces:
        own = getattr(pieces[index], name)()
        whole[tuple(slice(size) for size in own.shape)] = own
      return whole

    return from_parts((*lead, *of_matrix), np.dtype(np.float32), len(lead), part)

  magnitude = tensor("magnitude", (outputs,)) if next(iter(pieces.values())).magnitude else None
  return Change(tensor("a", (inputs, rank)), tensor("b", (rank, outputs)), scales, where, magnitude, dropout)


def _same(first: LazyTensor, second: LazyTensor) -> bool:
  """Whether what PEFT saves beside the factors of an embedding or a head is what the base has."""
  return first.shape == second.shape and np.array_equal(first.read(), second.read())


def _replaced(tensor: LazyTensor, pieces: Mapping[Index, LazyTensor]) -> LazyTensor:
  """A parameter with some parts of its stack replaced."""
  axes = len(next(iter(pieces)))
  dtype = np.result_type(tensor.dtype, *(piece.dtype for piece in pieces.values()))
  part = lambda index: (pieces[index].read() if index in pieces else tensor.part(index)).astype(dtype)  # noqa: E731
  return from_parts((*tensor.shape[:axes], *next(iter(pieces.values())).shape), dtype, axes, part)

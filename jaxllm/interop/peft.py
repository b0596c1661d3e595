"""PEFT's LoRA and DoRA adapters, read: their modules as our parameters."""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.adapter import Change, StoredAdapter
from jaxllm.interop.families import FAMILIES
from jaxllm.interop.huggingface import Place, places
from jaxllm.interop.peft_config import CONFIG_FILE, Settings, ends, listed, read_settings
from jaxllm.interop.pickled import read_pickled
from jaxllm.interop.safetensors import read_safetensors
from jaxllm.interop.stored import param_shapes
from jaxllm.interop.tensors import Index, LazyTensor, Tensors, from_parts
from jaxllm.models.config import ModelConfig

log = logging.getLogger("jaxllm")

WEIGHTS_FILE, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
NOT_USED = (".original_module.", ".trainable_tokens_original", ".lora_velora_embed")  # the base's; for training alone
TABLE = "embedding/tokens"
# The endings of a module's factors A [r, inputs] and B [outputs, r], and of DoRA's magnitude [outputs]
LINEAR, EMBEDDING = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
BIAS = ".lora_B.bias"  # [outputs], of a module that has a bias of its own
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
class PeftAdapter:
  """An adapter's tensors, none of them read, by the names that a family has for modules and what is in them.

  modules: factors by their endings. full: what is saved whole. rows: of tables, by module. table, head: the modules of
  the embedding and of a head over the vocabulary ("": there is none). tied: what was one matrix for both stays one, and
  there is nothing of the head here.
  """

  directory: Path
  raw: dict[str, Any]
  settings: Settings
  family: str
  modules: Mapping[str, Mapping[str, LazyTensor]]
  full: Tensors
  rows: Tensors
  table: str
  head: str
  tied: bool = False

  @property
  def vocabulary(self) -> int | None:
    """The rows of a table that it has whole, as one with new tokens does; None: it has none."""
    return next((self.full[name].shape[0] for name in self._whole()), None)

  def copies(self) -> set[str]:
    """Tensors that are a table of the base as it was trained on: PEFT saves them beside what was trained."""
    return {name for name in self._whole() if not ends(self.settings.saved, name.removesuffix(".weight"))}

  def tokens_of(self, module: str) -> tuple[int, ...]:
    """The tokens whose rows of a module are trained; a head's copies of the embedding's rows go by no name."""
    return self.settings.tokens_of(module) or self.settings.tokens_of(self.table)

  def of_tied(self, apart: bool = False) -> "PeftAdapter":
    """The same for a model with one matrix for embedding and head.

    Args:
      apart: another adapter has made two of the matrix; what changes it changes both then.
    """
    table, head = f"{self.table}.weight", f"{self.head}.weight"
    full = dict(self.full)
    for name in self.copies():  # a copy of one is one of the other
      full |= {other: full[name] for other in (table, head) if other not in full}
    both = dataclasses.replace(self, full=full)
    if not both._alike():
      return both
    if apart:
      rows = {**self.rows} | ({self.head: self.rows[self.table]} if self.table in self.rows else {})
      return dataclasses.replace(both, rows=rows)
    without = lambda tensors: {name: t for name, t in tensors.items() if name not in (head, self.head)}  # noqa: E731
    parts = {name: without(getattr(both, name)) for name in ("modules", "full", "rows")}
    return dataclasses.replace(both, **parts, tied=True)

  def _whole(self) -> list[str]:
    names = (f"{module}.weight" for module in (self.table, self.head))
    return [name for name in names if name in self.full and len(self.full[name].shape) == 2]

  def _alike(self) -> bool:
    """Whether it makes the same of the embedding and of the head."""
    both = self.table, self.head
    whole, rows = [self.full.get(f"{module}.weight") for module in both], [self.rows.get(module) for module in both]
    if not _same(*whole) or (rows[1] and not (_same(*rows) and len({self.tokens_of(module) for module in both}) == 1)):
      return False
    ours, theirs = (self.modules.get(module, {}) for module in both)
    if not ours and not theirs:
      return True
    if self.settings.dora or len({self.settings.scale_of(module) for module in both}) > 1:
      return False
    pairs = [(ours.get(end), theirs.get(other)) for end, other in zip(EMBEDDING, reversed(LINEAR))]
    return all(x and y and np.array_equal(x.read(), y.read().T) for x, y in pairs)


def _same(first: LazyTensor | None, second: LazyTensor | None) -> bool:
  if first is None or second is None or first is second:
    return first is second
  return first.shape == second.shape and np.array_equal(first.read(), second.read())


def read_adapter(directory: Path, config: ModelConfig, families: Sequence[str]) -> PeftAdapter:
  """The adapter in a directory, for a model of this config.

  Args:
    families: by whose names of modules it may have been trained; the first that knows all of them is taken.

  Raises:
    ConfigError: see `read_settings`; or a pattern takes too long. CheckpointError: its weights are missing, damaged, or
      of modules that the model has not; the message lists them.
  """
  raw, settings = read_settings(directory)
  modules: dict[str, dict[str, LazyTensor]] = {}
  full, rows = {}, {}
  for name, tensor in read_weights(directory).items():
    name = name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name
    ending = next((end for end in (*LINEAR, *EMBEDDING, MAGNITUDE, BIAS) if name.endswith(end)), None)
    if ending:
      modules.setdefault(name.removesuffix(ending), {})[ending] = tensor
    elif name.endswith(ROWS):
      rows[name.removesuffix(ROWS)] = tensor
    elif not any(part in name for part in NOT_USED):
      full[re.sub(r"\.(token_adapter|base_layer|modules_to_save)(?=\.)", "", name)] = tensor
  wanted = [*(f"{name}.weight" for name in (*modules, *rows)), *full]
  if not wanted:
    raise CheckpointError(f"the adapter in {directory} has no tensors")
  heads = {f: FAMILIES[f].named(FAMILIES[f].head, config.head) if config.head == "lm" else "" for f in families}
  found = {f: places(config, f, wanted) for f in families}

  def unknown(family: str) -> list[str]:
    known, names = found[family]
    return [name for name in wanted if names[name] not in known and names[name] != heads[family]]

  family = min(families, key=lambda f: len(unknown(f)))
  if lacking := [name.removesuffix(".weight") for name in unknown(family)]:
    raise CheckpointError(f"the adapter in {directory} does not fit its base model, which has no {listed(lacking)}")
  (known, names), head = found[family], heads[family]
  settings.check_patterns({name.rpartition(".")[0] for name in (*known, head)}, f"the adapter in {directory}")
  module_of = lambda name: names[f"{name}.weight"].removesuffix(".weight")  # noqa: E731
  of_module = {module_of(name): parts for name, parts in modules.items()}
  whole = {names[name]: tensor for name, tensor in full.items()}
  table = next(name for name, place in known.items() if place.weight.ours == (TABLE,)).removesuffix(".weight")
  trained = {*of_module, *(module_of(name) for name in rows), *(name.removesuffix(".weight") for name in whole)}
  for module in (table, head.removesuffix(".weight")):  # which the base that was trained may have had no name for
    if module not in trained and (settings.means(module) or ends(settings.saved, module)):
      log.warning("the adapter in %s names %s and has no weights of it: that stays as it is", directory, module)
  if config.architecture == "encoder_decoder" and (table in of_module or ends(settings.saved, table)):
    log.warning(
      "the adapter in %s changes %s, which PEFT's model looks nothing up in: that is left out", directory, table
    )
    of_module.pop(table, None)
    whole.pop(f"{table}.weight", None)
  of_rows = {module_of(name): tensor for name, tensor in rows.items()}
  return PeftAdapter(directory, raw, settings, family, of_module, whole, of_rows, table, head.removesuffix(".weight"))


def open_adapter(read: PeftAdapter, config: ModelConfig, tensors: Tensors) -> StoredAdapter:
  """The adapter, for a model with these parameters, whose vocabulary is the adapter's but for the tensors.

  Raises:
    CheckpointError: its weights are not those that its config and the model call for; the message lists them.
  """
  directory, settings, modules, full = read.directory, read.settings, read.modules, {**read.full}
  here = f"the adapter in {directory}"
  known, _ = places(config, read.family, [*(f"{name}.weight" for name in (*modules, *read.rows)), *full])
  shapes = param_shapes(config)

  def before(name: str) -> LazyTensor:
    """Their tensor as it is before what is trained apart: the adapter's own, else the base's."""
    place = known[name]
    dtype = np.result_type(*(tensors[path].dtype for path in place.weight.ours))
    base = lambda: place.weight.transform.write(config, [tensors[path].part(place.at) for path in place.weight.ours])  # noqa: E731
    return full.get(name) or LazyTensor(place.shape, dtype, base)

  _check_targets(read, known)
  for name in _fewer_tokens(read, config, tensors, known):
    longer = before(name)
    full[name] = LazyTensor(known[name].shape, longer.dtype, lambda x=longer: x.read()[: config.vocab_size])
  for module, rows in read.rows.items():
    name = f"{module}.weight"
    full[name] = _with_rows(read, module, known[name], before(name), rows)
  pieces: dict[str, dict[Index, _Piece]] = {}
  for module, parts in modules.items():
    name, bias, check = f"{module}.weight", f"{module}.bias", functools.partial(_fits, directory, module)
    if BIAS in parts:
      check(bias in known, "has no bias in the base, and its factors have one")
      check(parts[BIAS].shape == known[bias].shape, f"has a bias of shape {parts[BIAS].shape}")
      total = lambda x=before(bias), y=parts[BIAS], s=settings.scale_of(module): x.read() + np.float32(s) * y.read()  # noqa: E731
      full[bias] = LazyTensor(known[bias].shape, np.dtype(np.float32), total)
    start = None
    if settings.start and LINEAR[0] in parts and name not in read.full:  # else what is saved is without it
      check(module != read.head, "may be the embedding too, whose change at the start is not saved")
      start = before(name).read
    for path, piece in _pieces(directory, config, settings, shapes, module, parts, known[name], start):
      pieces.setdefault(path, {})[known[name].at] = piece
  changes = {path: _stacked(shapes[path], each, settings.dropout) for path, each in pieces.items()}
  replaced: dict[str, dict[Index, LazyTensor]] = {}
  for name, tensor in full.items():
    place = known[name]
    if tensor.shape != place.shape:
      raise CheckpointError(
        f"{here} does not fit its base model: {name} has shape {tensor.shape}, there it is {place.shape}"
      )
    own = [shapes[path][len(place.at) :] for path in place.weight.ours]
    for i, path in enumerate(place.weight.ours):
      part = lambda t=tensor, w=place.weight, parts=own, i=i: w.transform.read(config, t.read(), parts)[i]  # noqa: E731
      replaced.setdefault(path, {})[place.at] = LazyTensor(own[i], tensor.dtype, part)
  copies = {known[name].weight.ours[0] for name in read.copies() if name.removesuffix(".weight") not in read.rows}
  whole = {path: _replaced(tensors[path], each) for path, each in replaced.items()}
  whole = {path: new for path, new in whole.items() if not (path in copies and _same(new, tensors[path]))}
  partly = sorted(p for p, each in replaced.items() if len(each) < math.prod(shapes[p][: len(next(iter(each)))]))
  return StoredAdapter(read.raw, changes, whole, directory, tuple(partly))


def _fewer_tokens(
  read: PeftAdapter, config: ModelConfig, tensors: Tensors, known: Mapping[str, Place]
) -> Iterator[str]:
  """The tables that the adapter has not, and that have more tokens than its vocabulary.

  Raises:
    CheckpointError: it was trained on tables of more tokens, which are neither here nor in the base.
  """
  for module, end, axis in ((read.table, EMBEDDING[0], 1), (read.head, LINEAR[1], 0)):
    name, factor = f"{module}.weight", read.modules.get(module, {}).get(end)
    if name in known and name not in read.full:
      ours = known[name].weight.ours[0]
      there = tensors[ours].shape[ours != TABLE]
      wanted = factor.shape[axis] if factor and len(factor.shape) == 2 else config.vocab_size
      if wanted != config.vocab_size or there < wanted:
        raise CheckpointError(
          f"the adapter in {read.directory} was trained on a model with {wanted} tokens and has no {module} of that "
          f"size, its base has {there}: resize the base in the same way, save it, and name it as the adapter's base"
        )
      if there > wanted:
        yield name


def _check_targets(read: PeftAdapter, known: Mapping[str, Place]) -> None:
  """That the weights are those of the modules that the config names, all of them and no others."""
  settings, here = read.settings, f"the adapter in {read.directory}"
  if isinstance(settings.targets, str) and settings.targets.lower() == "all-linear":
    return
  extra = [m for m in read.modules if m not in (read.table, read.head) and not settings.means(m)]
  if extra and settings.targets is not None:
    raise CheckpointError(f"{here} has weights of {listed(extra)}, which its target_modules do not name")
  missing = []
  for name, place in known.items():
    module, kind = name.rpartition(".")[::2]
    if kind == "weight" and module not in (read.table, read.head):  # with names of their own in some transformers
      matrix = len(place.shape) == 2 and "/moe/" not in place.weight.ours[0]
      saved = ends(settings.saved, module)
      if name not in read.full if saved else matrix and settings.means(module) and module not in read.modules:
        missing.append(module)
  if missing:
    raise CheckpointError(f"{here} lacks the weights of {listed(missing)}, which its {CONFIG_FILE} names")


def _fits(directory: Path, module: str, holds: bool, problem: str) -> None:
  if not holds:
    raise CheckpointError(f"the adapter in {directory} does not fit its base model: {module} {problem}")


def _with_rows(read: PeftAdapter, module: str, place: Place, before: LazyTensor, rows: LazyTensor) -> LazyTensor:
  """Their tensor of a table with some rows replaced."""
  tokens, check = read.tokens_of(module), functools.partial(_fits, read.directory, module)
  wanted = (len(tokens), place.shape[-1])
  check(len(place.shape) == 2, "is no table of tokens")
  check(rows.shape == wanted, f"has rows of shape {rows.shape}, but {wanted} are called for")
  check(max(tokens, default=0) < place.shape[0], f"has no token {max(tokens, default=0)}, whose row was trained")

  dtype = np.result_type(before.dtype, rows.dtype)

  def table() -> np.ndarray:
    x = before.read().astype(dtype)
    x[list(tokens)] = rows.read()
    return x

  return LazyTensor(place.shape, dtype, table)


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


def _pieces(directory, config, settings, shapes, module, parts, place, start) -> Iterator[tuple[str, _Piece]]:
  """(parameter, its change) of a module: of a fused one, several, each with all of A and its own columns of B.

  Args:
    start: reads the base's matrix, of which the factors began as a part that PEFT takes off it; None: they did not.
  """
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
  rank, scale = settings.rank_of(module), settings.scale_of(module)
  for name, tensor, shape in ((first, A, (rank, inputs)), (second, B, (sum(outputs), rank))):
    check(tensor.shape == shape, f"has {name[1:]} of shape {tensor.shape}, but {shape} are called for")
  lying = inputs_first(config, place, outputs)
  if start is not None:
    check(rank <= min(inputs, sum(outputs)), f"has a rank of {rank}, above that of its matrix")
    A, B, rank = *_without_start(settings.start, start, lying, A, B, scale), 2 * rank

  def columns(tensor: LazyTensor, i: int) -> np.ndarray:
    x = tensor.read()
    shapes = [(*x.shape[1:], count) for count in outputs]
    return place.weight.transform.read(config, x.T if x.ndim > 1 and lying else x, shapes)[i]

  magnitude = parts.get(MAGNITUDE)
  if magnitude is not None:
    wanted = (sum(outputs),)
    check(magnitude.shape in (wanted, (1, *wanted)), f"has a magnitude of shape {magnitude.shape}, not {wanted}")
    flat = magnitude.read
    magnitude = LazyTensor(wanted, magnitude.dtype, lambda: flat().reshape(-1))
  for i, path in enumerate(place.weight.ours):
    lengths = None if magnitude is None else (lambda i=i, m=magnitude: columns(m, i))
    yield path, _Piece(lambda: A.read().T, lambda i=i: columns(B, i), lengths, rank, scale)


def _without_start(
  kind: str, matrix: Callable[[], np.ndarray], lying: bool, a: LazyTensor, b: LazyTensor, scale: float
) -> tuple[LazyTensor, LazyTensor]:
  """Factors [2 r, inputs], [outputs, 2 r] that are theirs without those with which they began, as PEFT has them when it
  takes these off the base: the largest singular values ("pissa") or the first columns of QR ("olora")."""
  rank = a.shape[0]

  @functools.cache
  def first() -> tuple[np.ndarray, np.ndarray]:
    w = matrix().astype(np.float32)
    if kind == "olora":
      q, r = np.linalg.qr(w)
      return (q[:, :rank].T, r[:rank].T) if lying else (r[:rank], q[:, :rank])
    u, values, v = np.linalg.svd(w.T if lying else w, full_matrices=False)
    roots = np.sqrt(values[:rank] / np.float32(scale))
    return roots[:, None] * v[:rank], u[:, :rank] * roots

  return (
    LazyTensor((2 * rank, a.shape[1]), np.dtype(np.float32), lambda: np.concatenate([a.read(), first()[0]])),
    LazyTensor((b.shape[0], 2 * rank), np.dtype(np.float32), lambda: np.concatenate([b.read(), -first()[1]], 1)),
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


def _replaced(tensor: LazyTensor, pieces: Mapping[Index, LazyTensor]) -> LazyTensor:
  """A parameter with some parts of its stack replaced."""
  axes = len(next(iter(pieces)))
  dtype = np.result_type(tensor.dtype, *(piece.dtype for piece in pieces.values()))
  part = lambda index: (pieces[index].read() if index in pieces else tensor.part(index)).astype(dtype)  # noqa: E731
  return from_parts((*tensor.shape[:axes], *next(iter(pieces.values())).shape), dtype, axes, part)

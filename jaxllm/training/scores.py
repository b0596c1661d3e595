"""What a model that is not trained says of each row, computed once and kept on disk: a reference's log-probabilities.

The objective names the model (`Objective.cached`) and what it wants of it (`Objective.scores`). Before step 0 all rows
that the run can read, held-out ones too, are scored; then the model goes, and rows find their scores by their content.
RUN/scores.npz says of which model, tokenizer, template and data it is, and every start computes a few rows again.
"""

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Float, UInt8

from jaxllm.base.errors import CheckpointError, ConfigError
from jaxllm.base.files import local_path, write_atomically
from jaxllm.data.manifest import Prepared
from jaxllm.data.tasks import stacked
from jaxllm.interop.fingerprint import fingerprint
from jaxllm.models.build import Params, declare, init_params
from jaxllm.objectives.base import Batch, Objective
from jaxllm.parallel import agreement
from jaxllm.parallel.batch import put_batch
from jaxllm.parallel.sharding import activation_sharding, replicated
from jaxllm.training.batches import Batches, DiskBatches
from jaxllm.training.compile import Program, make_program
from jaxllm.training.config import RunConfig
from jaxllm.training.start import POLICY, begun, open_start
from jaxllm.training.teachers import check_teachers

logger = logging.getLogger("jaxllm")
FILE = "scores.npz"
# How far rows may be from what they were, over 1 + their size: in 16 bits sums depend on the mesh.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
Digest = bytes


class ScoredBatches:
  """Batches whose rows have a model's scores, once `table` is filled."""

  def __init__(self, batches: DiskBatches, objective: Objective):
    self.rows, self._objective = batches, objective
    self.heldout: Iterable[Batch] | None = None if batches.heldout is None else _Scored(batches.heldout, self.scored)
    self.table: dict[Digest, Float[np.ndarray, " scores"]] = {}
    self.structure: Any = None  # of a row's scores

  @property
  def epochs(self) -> float:
    return self.rows.epochs

  def next(self, policy: Callable[[], Params]) -> Batch | None:
    batch = self.rows.next(policy)
    return None if batch is None else self.scored(batch)

  def get_state(self) -> Any:
    return self.rows.get_state()

  def set_state(self, state: Any) -> None:
    self.rows.set_state(state)

  def close(self) -> None:
    self.rows.close()

  def scored(self, batch: Batch) -> Batch:
    """The batch with the scores of its rows; rows of padding have none."""
    found = np.stack([self.table[row] for row in digests(batch)])
    return joined(batch, jax.tree.unflatten(self.structure, list(np.ascontiguousarray(found.T))))


@dataclasses.dataclass
class _Scored:
  """Held-out batches with scores."""

  batches: Any
  scored: Callable[[Batch], Batch]

  def __iter__(self) -> Iterator[Batch]:
    return map(self.scored, self.batches)

  @property
  def bytes(self) -> float | None:
    return getattr(self.batches, "bytes", None)

  @property
  def sources(self) -> list[str]:
    return self.batches.sources

  @property
  def source_bytes(self) -> dict[str, float]:
    return self.batches.source_bytes


def with_scores(batches: Batches, objective: Objective) -> Batches:
  """The batches, with a place for scores where the objective wants them.

  Raises:
    ConfigError: they are not from disk, so that what they will have is not known before.
  """
  if not objective.cached:
    return batches
  if not isinstance(batches, DiskBatches):
    raise ConfigError(f"objective.cache_{objective.cached} needs prepared data, whose rows are known before step 0")
  return ScoredBatches(batches, objective)


def fill_scores(
  batches: Batches, run: RunConfig, program: Program, prepared: Prepared, directory: Path, key: jax.Array
) -> None:
  """Reads or computes the scores that the batches' rows need; all processes call it.

  Args:
    directory: the run's. key: that its fresh weights are drawn with.

  Raises:
    CheckpointError: the scores on disk are of another model, tokenizer, template or data, or no longer what the model
      says.
  """
  if not isinstance(batches, ScoredBatches):
    return
  scorer = _Scorer.of(run, program, prepared, directory, key)
  facts = _facts(run, program, prepared)
  rows, file = batches.rows, directory / FILE
  if agreement.first_does(file.exists):
    with agreement.together():
      names, values = _read(file, facts)
    batches.table = dict(zip(map(bytes, names), values))
    few = [i * rows.num_rows // program_rows(program) for i in range(min(program_rows(program), rows.num_rows))]
    _check(scorer(stacked([rows.row(i) for i in few])), batches, rows, few, program, file)
  else:
    for start in range(0, rows.num_rows, program_rows(program)):
      part = [rows.row(i) for i in range(start, min(start + program_rows(program), rows.num_rows))]
      batch = stacked(part)
      batches.table.update(zip(digests(batch), scorer(batch)))
    logger.info("%s: %d rows scored by the %s", directory / FILE, rows.num_rows, run.objective.cached)
    agreement.first_does(lambda: _write(file, facts, batches.table))
  batches.structure = scorer.structure
  empty = jax.tree.map(lambda entry: np.zeros((1, *entry.shape), entry.dtype), rows.row(0))
  batches.table[digests(empty)[0]] = np.zeros(scorer.structure.num_leaves, np.float32)


def program_rows(program: Program) -> int:
  """Rows of a batch."""
  return jax.tree.leaves(program.batch)[0].shape[0]


@dataclasses.dataclass
class _Scorer:
  """A model and the program that scores a batch with it."""

  objective: Objective
  program: Program
  params: Params
  score: Any  # jitted: (params, batch) -> scores
  structure: Any

  @classmethod
  def of(cls, run: RunConfig, program: Program, prepared: Prepared, directory: Path, key: jax.Array) -> "_Scorer":
    objective, name = run.objective, run.objective.cached
    # As a run begins that keeps the model, in a place where none has begun.
    source, start = open_start(dataclasses.replace(run, objective=objective.uncached), directory / "none")
    check_teachers(start, prepared.tokenizer(), run.model)
    whole = make_program(
      source.model, run.training, run.optimizer, run.mesh, program.mesh, source.objective, source.data, run.compute,
      run.peft, start,
    )  # fmt: skip
    if name in start.others:
      graph = declare(start.others[name], program.compute)[0]
      params = traverse_util.unflatten_dict(start.load({name: whole.loaded[name]})[name], sep="/")
    else:
      graph, fresh = whole.graph, lambda: init_params(source.model, key, program.mesh, run.mesh.rules)
      params = whole.begin(key, begun(directory, start, {POLICY: whole.loaded[POLICY]}, fresh))

    def score(params, batch):
      with activation_sharding(program.mesh, run.mesh.rules):
        return objective.scores(nnx.merge(graph, params), batch)

    structure = jax.tree.structure(jax.eval_shape(score, params, program.batch))
    return cls(objective, program, params, jax.jit(score, out_shardings=replicated(program.mesh)), structure)

  def __call__(self, batch: Batch) -> Float[np.ndarray, "rows scores"]:
    """The scores of rows, as many as a batch has or fewer, which every process has read."""
    count, size = len(jax.tree.leaves(batch)[0]), program_rows(self.program)
    filled = jax.tree.map(lambda x: np.concatenate([x, np.zeros((size - count, *x.shape[1:]), x.dtype)]), batch)
    empty = jax.tree.unflatten(self.structure, [np.zeros(size, np.float32)] * self.structure.num_leaves)
    found = self.score(self.params, put_batch(joined(filled, empty), self.program.batch))
    return np.stack(jax.tree.leaves(jax.device_get(found)), axis=1)[:count]


def joined(batch: Batch, more: Batch) -> Batch:
  """The entries of both, at every depth."""
  nested = {name: joined(batch[name], entry) for name, entry in more.items() if isinstance(entry, dict)}
  return batch | more | nested


def digests(batch: Batch) -> list[Digest]:
  """What tells rows apart: their content."""
  leaves = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(batch)]
  found = []
  for row in range(len(leaves[0])):
    digest = hashlib.blake2b(digest_size=16)
    for leaf in leaves:
      digest.update(leaf[row].tobytes())
    found.append(digest.digest())
  return found


def _facts(run: RunConfig, program: Program, prepared: Prepared) -> dict[str, Any]:
  """All that scores follow from."""
  init, name = run.model_init, run.objective.cached
  path = getattr(run.objective, name, "")
  fresh = ["drawn from seed", run.training.seed, hashlib.sha256(repr(run.model).encode()).hexdigest()]
  model, stored = path or init.path, getattr(run.peft, "path", "")
  return {
    "model": _weights(model, None if path else init.step) if model else fresh,
    "adapter": _weights(init.adapter, alone=True) if init.adapter and not path else None,
    "adapter to go on with": _weights(stored, alone=True) if stored and not path else None,  # it may have whole modules
    "quantize": None if path else [init.quantize, init.group_size, init.double_quantize],
    "dtype": program.compute.dtype,
    "tokenizer": prepared.tokenizer_fingerprint,
    "template": prepared.masks,
    "data": prepared.content,
    "seq_len": run.training.seq_len,
    "truncation": run.data.truncation,
  }


def _weights(path: str, step: int | None = None, alone: bool = False) -> str:
  return agreement.first_does(lambda: fingerprint(local_path(path), step, alone))


def _write(file: Path, facts: dict[str, Any], table: dict[Digest, np.ndarray]) -> None:
  names = np.frombuffer(b"".join(table), np.uint8).reshape(-1, 16)
  content = io.BytesIO()
  np.savez(content, digests=names, scores=np.stack(list(table.values())), facts=json.dumps(facts))
  write_atomically(file, content.getvalue())


def _read(file: Path, facts: dict[str, Any]) -> tuple[UInt8[np.ndarray, "rows 16"], Float[np.ndarray, "rows scores"]]:
  try:
    with np.load(file) as kept:
      before, names, values = json.loads(str(kept["facts"])), kept["digests"], kept["scores"]
  except Exception as error:  # NumPy's and zipfile's errors for a damaged file are of many kinds
    raise CheckpointError(f"{file} is damaged; delete it, and it is computed again") from error
  for name, now in json.loads(json.dumps(facts)).items():
    if before.get(name) != now:
      raise CheckpointError(
        f"the {name} has changed since {file} was computed; put back what was there, or choose another --workdir"
      )
  return names, values


def _check(
  found: Float[np.ndarray, "rows scores"],
  batches: ScoredBatches,
  rows: DiskBatches,
  few: Sequence[int],
  program: Program,
  file: Path,
) -> None:
  """That rows are as the table has them."""
  for number, name, now in zip(few, digests(stacked([rows.row(i) for i in few])), found):
    before = batches.table.get(name)
    if before is None:
      raise CheckpointError(f"{file} has not the row {number} of the data: it has changed; choose another --workdir")
    if (np.abs(now - before) > _TOLERANCE[program.compute.dtype] * (1 + np.abs(before))).any():
      raise CheckpointError(
        f"the model has changed since {file} was computed: row {number} of the data had the scores {before.tolist()}, "
        f"now {now.tolist()}; put back what was there, or choose another --workdir"
      )

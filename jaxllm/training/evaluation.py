"""A held-out set that a run measures itself on: its own, or a replay set that shows what it forgets."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxllm.base.errors import ConfigError, DataError
from jaxllm.data.config import DataConfig
from jaxllm.data.heldout import heldout_batches
from jaxllm.data.manifest import Prepared, open_any
from jaxllm.objectives.base import Batch, Metrics, Objective
from jaxllm.objectives.causal_lm import CausalLM
from jaxllm.objectives.heldout import heldout_metrics
from jaxllm.parallel.batch import local_rows, put_batch
from jaxllm.parallel.sharding import activation_sharding, batch_sharding
from jaxllm.training.compile import Frozen, Program
from jaxllm.training.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Held-out batches, and what an objective says of a model on them."""

  objective: Objective
  metric_sums: Callable[[Any, Frozen, Batch], Metrics]  # jitted: of (trained, frozen, batch)
  batches: Iterable[Batch]  # of each the rows that this process reads
  like: Any  # the batch as ShapeDtypeStructs with shardings

  def __call__(self, params: Any, frozen: Frozen, prefix: str, ask: Callable[[], None]) -> dict[str, float]:
    """The figures, each with `prefix` before its name, the same on all processes.

    Args:
      params: what is trained. ask: called before each batch; what it raises ends the evaluation.
    """
    rows = local_rows(self.like)

    def metric_sums(batch):
      ask()
      return self.metric_sums(params, frozen, put_batch(batch, self.like, rows))

    return heldout_metrics(self.objective, metric_sums, self.batches, prefix)

  def figures(self, program: Program) -> list[str]:
    """The names of the figures, without a prefix; traced, not computed."""
    sums = jax.eval_shape(self.metric_sums, program.state.params, program.frozen, self.like)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape), sums)
    names = list(self.objective.figures(ones, getattr(self.batches, "bytes", None)))
    sources = list(dict.fromkeys(getattr(self.batches, "sources", None) or []))
    return names + [f"{source}/{name}" for source in sources for name in names if len(sources) > 1]


def open_replay(run: RunConfig, program: Program, prepared: Prepared) -> Evaluation | None:
  """The held-out split of `training.replay_dir`; None without one.

  It is measured with the run's objective where that can read it and needs no other model, else as text to predict.

  Args:
    prepared: the run's own data.

  Raises:
    DataError: nothing is prepared or held out there, or for another tokenizer.
    ConfigError: a model like this cannot be measured on it.
  """
  directory, training = run.training.replay_dir, run.training
  if not directory:
    return None
  replay = open_any(directory)
  if replay.tokenizer_fingerprint != prepared.tokenizer_fingerprint:
    raise DataError(
      f"training.replay_dir {directory} was prepared with another tokenizer than {run.data.dir}; prepare it with "
      f"data.tokenizer.path={prepared.tokenizer_dir}"
    )
  task, labels = replay.config.get("examples") or (None, ())
  objective, task = _reader(run, task)
  data = dataclasses.replace(
    run.data,
    dir=directory,
    task=task,
    labels=tuple(labels),
    packing="none" if "classification" in task else "best_fit",
  )
  objective.check(run.model, data)
  mesh, rules = program.mesh, run.mesh.rules
  like = _batch(objective, data, run, program)
  batches = heldout_batches(
    data,
    batch_size=training.batch_size,
    seq_len=training.seq_len,
    max_batches=training.eval_batches,
    rows=local_rows(like),
    prepared=replay,
    decoder_start_id=run.model.decoder_start_id,
  )

  def evaluate_replay(trained, frozen, batch):
    with activation_sharding(mesh, rules):
      return objective({"policy": nnx.merge(program.graph, program.policy(trained, frozen))}, batch).metrics

  return Evaluation(objective, jax.jit(evaluate_replay), batches, like)


def _reader(run: RunConfig, task: str | None) -> tuple[Objective, Any]:
  """An objective that reads data prepared for a task (None: texts), and the task that it reads it as."""
  alone = not (run.objective.others or run.objective.cached)
  for objective in (*([run.objective] if alone else []), CausalLM()):
    tasks = [wanted for head, wanted in objective.heads_and_tasks if head == run.model.head]
    if run.model.architecture not in objective.architectures:
      continue
    as_text = [wanted for wanted in tasks if wanted in ("text", "masking", "span_corruption", "denoising")]
    found = [wanted for wanted in tasks if wanted == task] if task else sorted(as_text, key=run.data.task.__ne__)
    if found:
      return objective, found[0]
  raise ConfigError(
    f"training.replay_dir {run.training.replay_dir} was prepared for data.task {task or 'text'!r}, which a model with "
    f"model.architecture {run.model.architecture!r} and model.head {run.model.head!r} cannot be measured on"
  )


def _batch(objective: Objective, data: DataConfig, run: RunConfig, program: Program) -> Any:
  def placed(entry):
    sharding = batch_sharding(program.mesh, run.mesh.rules, 1 + entry.ndim)
    return jax.ShapeDtypeStruct((run.training.batch_size, *entry.shape), entry.dtype, sharding=sharding)

  return jax.tree.map(placed, objective.row(data, run.training.seq_len))

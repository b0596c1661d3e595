"""One step before step 0 that changes nothing, so that what does not fit in memory fails before anything is trained.

A run has one shape of batch, so its first step is as large as any. The very program that will train runs once, on a
batch without padding, with a state that is halted: a halted state stands still, bit for bit (`training.step`). That
needs no copy of it. An evaluation of such a batch follows, which has a program of its own.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxllm.objectives.base import Batch
from jaxllm.parallel.batch import local_rows, put_batch
from jaxllm.training.compile import Frozen, Program
from jaxllm.training.evaluation import Evaluation
from jaxllm.training.state import TrainState


def rehearse(
  program: Program, compiled: Any, state: TrainState, frozen: Frozen, *evaluations: Evaluation | None
) -> TrainState:
  """The state as it was, after a step and a batch of each evaluation; the one that comes in is donated."""
  begins = state.halted
  halted = jax.device_put(np.ones((), begins.dtype), begins.sharding)
  state, metrics = compiled(dataclasses.replace(state, halted=halted), frozen, full_batch(program.batch))
  state = dataclasses.replace(state, halted=begins)
  jax.block_until_ready((state, metrics))
  for one in evaluations:
    if one is not None:
      jax.block_until_ready(one.metric_sums(state.params, frozen, full_batch(one.like)))
  return state


def full_batch(like: Any) -> Batch:
  """A batch without padding: token 0 everywhere, in one segment, all of it trained."""
  rows = local_rows(like)

  def one(path, entry):
    counted = entry.dtype.kind == "f" or "segment_ids" in str(path[-1])
    return np.full((len(rows), *entry.shape[1:]), counted, entry.dtype)

  return put_batch(jax.tree_util.tree_map_with_path(one, like), like, rows)

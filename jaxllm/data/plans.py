"""Plans of large data, made once and kept beside it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxllm.data.arrays import kept_arrays
from jaxllm.data.config import DataConfig
from jaxllm.data.manifest import Prepared, SourceInfo, digest
from jaxllm.data.packing import Packing, Plan, SplitPlan, TablePlan

_FORMAT = 1  # of the files, and of the rules by which rows are filled
_SMALL = 1 << 16  # documents of which a plan is made faster than it is looked up


def plan_of(
  task: Any, prepared: Prepared, source: SourceInfo, split: str, *, config: DataConfig, packing: Packing, seq_len: int,
  seed: int | None, decoder_start_id: int = 0,
) -> Plan:  # fmt: skip
  """How a source's documents fill rows, as `task.plan` says.

  Of many documents it is looked up in the build's directory, where the first one who needs it puts it.
  """
  counts = prepared.token_counts(source, split)
  if len(counts) < _SMALL:
    return task.plan(counts, packing, seed)
  facts = [_FORMAT, source.name, split, config.task, dataclasses.asdict(config.corruption), config.truncation]
  facts += [config.target_len, packing, seq_len, seed, decoder_start_id]
  place = prepared.root / "plans" / digest(facts)[:32]
  if packing == "split":
    plan = task.plan(counts, packing, seed)
    assert isinstance(plan, SplitPlan)
    plan.store = place
    return plan
  made: list[TablePlan] = []
  kept = kept_arrays(place, lambda: _arrays(lambda: task.plan(counts, packing, seed), made))
  if kept is None:
    return made[0] if made else task.plan(counts, packing, seed)
  rest = dict(zip(Plan().lost, kept["lost"].tolist()))
  return TablePlan(kept["documents"], kept["starts"], kept["sizes"], kept["row_offsets"], **rest)


def _arrays(make: Callable[[], TablePlan], made: list[TablePlan]) -> Iterator[dict[str, np.ndarray]]:
  plan = make()
  made.append(plan)
  small = np.int32 if len(plan.documents) < 2**31 else np.int64
  yield {
    "documents": plan.documents.astype(small),
    "starts": plan.starts.astype(np.int64 if plan.starts.max(initial=0) >= 2**31 else np.int32),
    "sizes": plan.sizes.astype(np.int32),
    "row_offsets": plan.row_offsets.astype(np.int64),
    "lost": np.array(list(plan.lost.values()), np.int64),
  }

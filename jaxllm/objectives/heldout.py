"""Held-out figures: an objective's metrics, summed over every held-out batch."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from jaxllm.objectives.base import Batch, Metrics, Objective


def heldout_metrics(
  objective: Objective,
  metric_sums: Callable[[Batch], Metrics],
  batches: Iterable[Batch],
  prefix: str = "eval/",
) -> dict[str, float]:
  """The objective's `figures` over all batches, each name with `prefix` before it.

  Where batches come from several sources, those of each too, as "eval/books/loss".

  Args:
    metric_sums: the metrics of a batch; sums over all hosts.
    batches: everything that is held out, once; its `bytes`, if it has any, are those of the text that the targets
      stand for. `sources`, if it has them, say whose rows each batch holds, and `source_bytes` are theirs.
  """
  sums: list[Metrics] = []
  for batch in batches:
    sums.append(metric_sums(batch))
    # One batch ahead leaves no gap. More would fill the device's memory with batches that wait, and on CPUs take the
    # threads that the collectives of those before them need: hosts then wait for each other for ever.
    jax.block_until_ready(sums[-2:-1])
  found = jax.device_get(sums)
  figures = _figures(objective, found, getattr(batches, "bytes", None))
  names = getattr(batches, "sources", None) or []
  for source in dict.fromkeys(names) if len(set(names)) > 1 else ():
    own = [one for one, name in zip(found, names, strict=True) if name == source]
    own_bytes = batches.source_bytes.get(source)  # type: ignore[attr-defined]
    figures |= {f"{source}/{name}": value for name, value in _figures(objective, own, own_bytes).items()}
  return {prefix + name: value for name, value in figures.items()}


def _figures(objective: Objective, sums: list[Metrics], text_bytes: float | None) -> dict[str, float]:
  totals = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *sums)
  return objective.figures(totals, text_bytes)


def describe(metrics: dict[str, Any], prefix: str = "eval/") -> str:
  """The held-out loss and what else counts, as a person reads it; "" without a held-out loss."""
  names = {"loss": "loss", "bits_per_byte": "bits per byte", "accuracy": "accuracy", "f1": "F1"}
  found = [f"{text} {metrics[prefix + name]:.4f}" for name, text in names.items() if prefix + name in metrics]
  return f"{prefix.rstrip('/')}: {', '.join(found)}" if found else ""

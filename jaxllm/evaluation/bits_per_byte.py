"""Held-out metrics; bits per byte of text compares models with other tokenizers, and with gzip."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

# By name a sum and its weight, "nll" in nats among them; of vectors the metric is the mean of the ratios.
MetricSums = dict[str, tuple[Float[Array, "..."], Float[Array, "..."]]]


def heldout_metrics(
  metric_sums: Callable[[dict[str, Any]], MetricSums],
  batches: Iterable[dict[str, np.ndarray]],
  total_bytes: float | None,
  prefix: str = "eval/",
) -> dict[str, float]:
  """<prefix>loss (nats per target), <prefix>perplexity, <prefix>bits_per_byte and the other metrics, over all batches.

  Args:
    metric_sums: the metrics of a batch; sums over all hosts.
    batches: every held-out token once.
    total_bytes: of the text that those tokens stand for; None: bits per byte mean nothing here.
  """
  sums: list[MetricSums] = []
  for batch in batches:
    sums.append(metric_sums(batch))
    # One batch ahead leaves no gap. More would fill the device's memory with batches that wait, and on CPUs take the
    # threads that the collectives of those before them need: hosts then wait for each other for ever.
    jax.block_until_ready(sums[-2:-1])
  totals = jax.tree.map(lambda *x: np.sum(x, axis=0, dtype=np.float64), *jax.device_get(sums))
  values = {f"{prefix}{name}": _mean_ratio(*totals[name]) for name in totals if name != "nll"}
  nll, weight = totals["nll"]
  values[f"{prefix}loss"] = loss = _mean_ratio(nll, weight)
  values[f"{prefix}perplexity"] = math.exp(min(loss, 700.0))
  if total_bytes is not None:
    values[f"{prefix}bits_per_byte"] = float(nll) / math.log(2) / total_bytes
  return values


def _mean_ratio(total: np.ndarray, weight: np.ndarray) -> float:
  """Mean of total / weight where there is weight."""
  seen = weight != 0
  return float(np.mean(total[seen] / weight[seen])) if seen.any() else math.nan


def describe(metrics: dict[str, Any], prefix: str = "eval/") -> str:
  """The held-out loss and what else counts, as a person reads it; "" without a held-out loss."""
  names = {"loss": "loss", "bits_per_byte": "bits per byte", "accuracy": "accuracy", "f1": "F1"}
  found = [f"{text} {metrics[prefix + name]:.4f}" for name, text in names.items() if prefix + name in metrics]
  return f"{prefix.rstrip('/')}: {', '.join(found)}" if found else ""

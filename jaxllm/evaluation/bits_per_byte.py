"""Held-out loss, per token and per byte of text: the second compares models with other tokenizers, and with gzip."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

LossSums = tuple[Float[Array, ""], Float[Array, ""]]  # nll in nats, and the weight of its tokens


def heldout_metrics(
  loss_sums: Callable[[dict[str, Any]], LossSums],
  batches: Iterable[dict[str, np.ndarray]],
  total_bytes: float,
  prefix: str = "eval/",
) -> dict[str, float]:
  """<prefix>loss (nats per token), <prefix>perplexity and <prefix>bits_per_byte over all batches.

  Args:
    loss_sums: the summed loss of a batch; sums over all hosts.
    batches: every held-out token once.
    total_bytes: of the text that those tokens stand for.
  """
  # Sums stay on the device until the end, so that batches follow each other without a gap.
  sums = [loss_sums(batch) for batch in batches]
  nll, tokens = (math.fsum(float(x) for x in column) for column in zip(*jax.device_get(sums)))
  loss = nll / tokens
  return {
    f"{prefix}loss": loss,
    f"{prefix}perplexity": math.exp(min(loss, 700.0)),
    f"{prefix}bits_per_byte": nll / math.log(2) / total_bytes,
  }

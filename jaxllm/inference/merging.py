"""By how much a model's logits change when its adapters are merged into weights of some type."""

import dataclasses

import numpy as np
from jaxtyping import Float

from jaxllm.inference.load import read_weights
from jaxllm.interop.stored import StoredModel

ROWS, TOKENS = 4, 32  # of what both models read
# Of what is written, over the largest logit: weights of 16 bits round each change
ALLOWED = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Difference:
  """largest: of any logit. scale: the largest logit. allowed: of their ratio, by default."""

  largest: float
  scale: float
  allowed: float

  def within(self, allowed: float | None = None) -> bool:
    """Whether it is at most so many times the scale; False for what is no number."""
    return bool(self.largest <= (self.allowed if allowed is None else allowed) * self.scale)


def merge_difference(stored: StoredModel, dtype: str | None = None) -> Difference:
  """The model with its adapters apart, beside the one whose merged weights are rounded to a type; one after the other
  in memory, both computed in float32.

  Args:
    stored: with adapters apart. dtype: of the merged weights; None: as the base's are.
  """
  merged = stored.merged(dtype)
  before, after = (_logits(one) for one in (stored, merged))
  return Difference(float(np.abs(after - before).max()), float(np.abs(before).max()), ALLOWED.get(merged.dtype, 1e-4))


def _logits(stored: StoredModel) -> Float[np.ndarray, "..."]:
  """Of a few fixed rows; of a model without a head, its hidden states."""
  model, config = read_weights(stored, dtype="float32"), stored.config
  ids = np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, min(TOKENS, config.max_seq_len)), np.int32)
  if config.head == "none":
    return np.stack(model.encode(ids.tolist()))
  return np.asarray(model(ids, encoder_inputs=ids) if config.architecture == "encoder_decoder" else model(ids))

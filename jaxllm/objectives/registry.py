"""Objectives by name."""

from collections.abc import Callable

from jaxllm.objectives.causal_lm import causal_lm
from jaxllm.objectives.classification import classification
from jaxllm.objectives.masked_lm import masked_lm
from jaxllm.objectives.seq2seq import seq2seq
from jaxllm.objectives.vocabulary import Loss

# (model, batch, key, *, z_loss) -> Loss
OBJECTIVES: dict[str, Callable[..., Loss]] = {
  "causal_lm": causal_lm,
  "masked_lm": masked_lm,
  "seq2seq": seq2seq,
  "classification": classification,
}

"""Which objective a run has, and what each one needs: read before jax starts."""

import dataclasses
from typing import Literal, NamedTuple


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
  name: Literal["causal_lm", "masked_lm", "seq2seq", "classification"] = "causal_lm"


class Needs(NamedTuple):
  """The values that work, of model.architecture, and of (model.head, data.task) together."""

  architectures: tuple[str, ...]
  heads_and_tasks: tuple[tuple[str, str], ...]


NEEDS = {
  "causal_lm": Needs(("decoder",), (("lm", "text"),)),
  "masked_lm": Needs(("encoder",), (("lm", "masking"),)),
  "seq2seq": Needs(("encoder_decoder",), (("lm", "span_corruption"), ("lm", "denoising"), ("lm", "pairs"))),
  "classification": Needs(("encoder", "decoder"), (("sequence", "classification"), ("token", "token_classification"))),
}

"""Low-rank adapters of the direction, with a magnitude of each output apart (Liu et al., arXiv 2402.09353)."""

import dataclasses
from typing import ClassVar

from jaxllm.models.lora import DoraWeight, column_lengths
from jaxllm.peft.lora import Lora


@dataclasses.dataclass(frozen=True)
class Dora(Lora):
  """m (W + scale A B) / |W + scale A B|, each output's column by its own length; m begins as W's lengths."""

  kind: ClassVar[str] = "dora"

  def wrap(self, module, w, key, kept):
    inner = super().wrap(module, w, key, kept)
    parts = {name: getattr(inner, name) for name in ("base", "a", "b", "scale", "dropout")}
    return DoraWeight(**parts, magnitude=column_lengths(w))

"""Rows that decoders with experts share.

Published checkpoints have a tensor for each expert's matrix; transformers holds one for all experts of a layer.
"""

from jaxllm.interop.families import llama
from jaxllm.interop.families import table as t

MATRICES = tuple(f"blocks/moe/{part}/weight" for part in ("gate", "up", "down"))


def separate(experts, *names):
  """A tensor for each expert's matrix: gate, up and down by these names."""
  return tuple(
    t.Weight((path,), f"{llama.LAYER}.{experts}.{{expert}}.{name}.weight", t.TRANSPOSED)
    for path, name in zip(MATRICES, names)
  )


SEPARATE = separate("mlp.experts", "gate_proj", "up_proj", "down_proj")
STACKED = (
  t.Weight(MATRICES[:2], f"{llama.LAYER}.mlp.experts.gate_up_proj", t.ROWS),
  t.Weight(MATRICES[2:], f"{llama.LAYER}.mlp.experts.down_proj", t.TRANSPOSED),
)
ROUTER = t.Weight(("blocks/moe/router/weight",), f"{llama.LAYER}.mlp.gate.weight", t.TRANSPOSED)

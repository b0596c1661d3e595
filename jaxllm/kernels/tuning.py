"""Tile sizes that were measured on a chip, in `tiles.json`; what is not there a kernel chooses itself.

`tools/tune_kernels.py` measures on the device at hand and writes the table: chip -> op -> facts of the call -> tiles.
"""

import functools
import importlib.resources
import json

from jaxllm.kernels.backends import TARGETS


def tuned(op: str, target: str | None, **facts) -> dict[str, int] | None:
  """The measured tiles of `op` for such a call ("attention_forward", "h200", head_dim=128), or None.

  A chip that was not measured takes the figures of another one of its family.
  """
  if target is None:
    return None
  table = _table()
  family = [chip for chip in TARGETS if TARGETS[chip] == TARGETS[target] and chip != target]
  for chip in (target, *family):
    if (found := table.get(chip, {}).get(op, {}).get(key_of(**facts))) is not None:
      return found
  return None


def key_of(**facts) -> str:
  """The key of a call's facts in the table: "dtype=bfloat16 head_dim=128"."""
  return " ".join(f"{name}={facts[name]}" for name in sorted(facts))


@functools.cache
def _table() -> dict:
  return json.loads(importlib.resources.files("jaxllm.kernels").joinpath("tiles.json").read_text())

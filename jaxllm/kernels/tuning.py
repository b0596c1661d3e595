"""Tile sizes that were measured on a chip, in `tiles.json`; what is not there a kernel chooses itself.

`tools/tune_kernels.py` measures on the device at hand and writes the table: chip -> op -> facts of the call -> tiles.
"""

import contextlib
import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterator
from typing import TypeVar

from jaxllm.kernels.backends import TARGETS

Tiles = TypeVar("Tiles")

_trying: dict[str, dict] = {}  # op -> tiles, while the tuner measures them
_asked: dict[str, str] = {}  # op -> the key of its last call


def tiles(op: str, target: str | None, default: Tiles, **facts) -> Tiles:
  """The tiles of a call: `default`, with the fields replaced that the table has for such a call.

  A chip that was not measured takes the figures of another one of its family.

  Args:
    op: a kernel's name, such as "attention_forward".
    default: a dataclass, what the kernel would choose.
    facts: what the best choice depends on, such as head_dim=128.
  """
  key = " ".join(f"{name}={facts[name]}" for name in sorted(facts))
  _asked[op] = key
  if op in _trying:
    return dataclasses.replace(default, **_trying[op])  # type: ignore[type-var]
  if target is None:
    return default
  family = [chip for chip in TARGETS if TARGETS[chip] == TARGETS[target] and chip != target]
  for chip in (target, *family):
    if (found := _table().get(chip, {}).get(op, {}).get(key)) is not None:
      return dataclasses.replace(default, **found)  # type: ignore[type-var]
  return default


@contextlib.contextmanager
def trying(op: str, candidate: dict) -> Iterator[dict[str, str]]:
  """While tracing inside, `op` takes the candidate's fields; yields where the facts of its call will stand."""
  _trying[op] = candidate
  try:
    yield _asked
  finally:
    del _trying[op]


@functools.cache
def _table() -> dict:
  return json.loads(importlib.resources.files("jaxllm.kernels").joinpath("tiles.json").read_text())

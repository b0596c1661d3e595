"""The adapters in a tree of parameters, as what an adapter in files is."""

from typing import Any

import numpy as np

from jaxllm.base.errors import ConfigError
from jaxllm.interop.adapter import Change
from jaxllm.interop.tensors import LazyTensor, from_parts, in_memory
from jaxllm.models.lora import DoraWeight, LoraWeight
from jaxllm.models.weights import PerLayer, is_adapted, map_weights_with_path


def changes_of(params: Any) -> dict[str, Change]:
  """The adapters in a tree of parameters in memory, by parameter.

  A LoRA over a LoRA is one of both ranks. Raises ConfigError where a DoRA stands under another adapter, or beside a
  LoRA in one stack.
  """
  found: dict[str, Change] = {}

  def one(path, w):
    if is_adapted(w):
      found[path] = _of_layers(path, w) if isinstance(w, PerLayer) else _change(path, w)

  map_weights_with_path(one, params)
  return found


def _change(path: str, w: LoraWeight) -> Change:
  a, b, scales = np.asarray(w.a, np.float32), np.asarray(w.b, np.float32), np.full(w.shape[:-2], w.scale, np.float64)
  scales = scales if w.scales is None else scales * np.asarray(w.scales, np.float64)
  under = w.base
  while is_adapted(under):
    if isinstance(under, DoraWeight | PerLayer):
      raise ConfigError(f"{path}: an adapter over a DoRA adapter is not one of PEFT's; merge the inner one first")
    factor = under.scale * (1 if under.scales is None else np.asarray(under.scales)) / scales
    a = np.concatenate([a, np.asarray(under.a, np.float32)], -1)
    b = np.concatenate([b, np.asarray(under.b, np.float32) * factor[..., None, None].astype(np.float32)], -2)
    under = under.base
  magnitude = np.asarray(w.magnitude, np.float32) if isinstance(w, DoraWeight) else None
  parts = in_memory({"a": a, "b": b} | ({} if magnitude is None else {"magnitude": magnitude}))
  where = np.ones(scales.shape, bool)
  return Change(parts["a"], parts["b"], scales, where, parts.get("magnitude"), w.dropout)


def _of_layers(path: str, w: PerLayer) -> Change:
  """The changes of layers that are kept apart, as of a stack."""
  each = [_change(path, layer) if is_adapted(layer) else None for layer in w.layers]
  some = [change for change in each if change is not None]
  if len({change.magnitude is None for change in some}) > 1:
    raise ConfigError(f"{path} has LoRA in some layers and DoRA in others, which one adapter of PEFT's cannot have")
  rank, (*lead, inputs, outputs) = max(change.rank for change in some), w.layers[0].shape

  def stacked(name: str, shape: tuple[int, ...]) -> LazyTensor:
    def part(index):
      whole, change = np.zeros(shape, np.float32), each[index[0]]
      if change is not None:
        own = getattr(change, name).part(index[1:])
        whole[tuple(slice(size) for size in own.shape)] = own
      return whole

    return from_parts((len(each), *lead, *shape), np.dtype(np.float32), 1 + len(lead), part)

  scales = np.stack([np.ones(lead) if change is None else change.scales for change in each])
  where = np.stack([np.zeros(lead, bool) if change is None else change.where for change in each])
  magnitude = None if some[0].magnitude is None else stacked("magnitude", (outputs,))
  return Change(stacked("a", (inputs, rank)), stacked("b", (rank, outputs)), scales, where, magnitude, some[0].dropout)

"""The tensors of a checkpoint under GGUF's names, in both directions, by the tables of architectures."""

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxllm.base.errors import CheckpointError
from jaxllm.interop.families.rope import halves
from jaxllm.interop.families.table import BY_HEAD, ROWS, Shape
from jaxllm.interop.gguf.rope import FACTORS, LONG_FACTORS, SHORT_FACTORS
from jaxllm.interop.gguf.table import Architecture
from jaxllm.interop.huggingface import BUFFERS, Place, config_from_huggingface, family_of, places
from jaxllm.interop.tensors import LazyTensor, Tensors, from_parts
from jaxllm.models.config import ModelConfig


def read_tensors(hf: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> Tensors:
  """Tensors under GGUF's names as the checkpoint's; what a file lacks is left out.

  Raises:
    CheckpointError: a tensor that the architecture does not have.
  """
  c, used = config_from_huggingface(hf), {FACTORS, LONG_FACTORS, SHORT_FACTORS}
  read: dict[str, LazyTensor] = {}
  for name, place, theirs, expert in _layout(c, hf, architecture):
    joined = architecture.joined.get(place.weight.ours[0], "").format(*place.at)
    if joined in tensors:
      theirs = (joined,)
    used.update(theirs)
    if any(x not in tensors for x in theirs):
      continue
    if len(theirs) > 1:
      read[name] = _joined(c, architecture, place, [tensors[x] for x in theirs])
    elif expert is not None:
      read[name] = _part(tensors[theirs[0]], expert)
    else:
      read[name] = _converted(c, architecture, place.weight.ours[0], tensors[theirs[0]], reading=True)
    if read[name].shape != place.shape:
      raise CheckpointError(f"the tensor {name} has shape {read[name].shape}; config.json calls for {place.shape}")
  if unexpected := [name for name in tensors if name not in used]:
    raise CheckpointError(
      f"the GGUF file has the tensor {unexpected[0]!r}, which a {architecture.name} model here has not"
    )
  return read


def write_tensors(hf: Mapping[str, Any], architecture: Architecture, tensors: Tensors) -> Tensors:
  """A checkpoint's tensors under GGUF's names, as llama.cpp wants them.

  Raises:
    CheckpointError: a tensor is missing or of another shape, or the architecture does not have it.
  """
  c, left = config_from_huggingface(hf), dict(tensors)
  if c.tie_embeddings:
    left.pop(family_of(hf).head, None)
  written: dict[str, LazyTensor] = {}
  experts: dict[str, list[LazyTensor]] = {}
  for name, place, theirs, expert in _layout(c, hf, architecture):
    if name not in left:
      raise CheckpointError(f"the checkpoint lacks the tensor {name} ({theirs[0]} in GGUF)")
    tensor, ours = left.pop(name), place.weight.ours
    if tensor.shape != place.shape:
      raise CheckpointError(f"the tensor {name} has shape {tensor.shape}; config.json calls for {place.shape}")
    if expert is not None:
      experts.setdefault(theirs[0], []).append(tensor)
    elif len(theirs) > 1:
      written |= _split(c, architecture, ours[0], tensor, theirs)
    else:
      written[theirs[0]] = _converted(c, architecture, ours[0], tensor, reading=False)
  for name in left:
    if not any(fnmatch.fnmatch(name, buffer) for buffer in BUFFERS):
      raise CheckpointError(f"GGUF's architecture {architecture.name} has no place for the tensor {name}")
  for name, parts in experts.items():
    shape = (len(parts), *parts[0].shape)
    written[name] = from_parts(shape, parts[0].dtype, 1, lambda index, parts=parts: parts[index[0]].read())
  return written


def _layout(
  c: ModelConfig, hf: Mapping[str, Any], architecture: Architecture
) -> Iterator[tuple[str, Place, tuple[str, ...], int | None]]:
  """(Hugging Face's name, its place in ours, GGUF's names of what is in it, the expert) of every tensor.

  Raises:
    CheckpointError: GGUF has no place for one.
  """
  for name, place in places(c, hf["model_type"], ())[0].items():
    ours, at = place.weight.ours, place.at
    found = architecture.tensor_names(c, ours)
    if not found:
      raise CheckpointError(f"GGUF's architecture {architecture.name} has no place for the tensor {name}")
    layer = at[:1]
    if c.moe and at:
      layer = (c.layers_with(ours[0].split("/")[1])[at[0]],)
    yield name, place, tuple(x.format(*layer) for x in found), at[1] if len(at) > 1 else None


def _part(tensor: LazyTensor, expert: int) -> LazyTensor:
  return LazyTensor(tensor.shape[1:], tensor.dtype, lambda: tensor.part((expert,)))


def _joined(c: ModelConfig, architecture: Architecture, place: Place, parts: list[LazyTensor]) -> LazyTensor:
  join = architecture.splits[place.weight.ours[0]].join
  dtype = np.result_type(*(part.dtype for part in parts))
  return LazyTensor(place.shape, dtype, lambda: join(c, [part.read() for part in parts]))


def _split(
  c: ModelConfig, architecture: Architecture, path: str, tensor: LazyTensor, names: tuple[str, ...]
) -> Tensors:
  split = architecture.splits[path].split
  shapes = [part.shape for part in split(c, np.broadcast_to(np.int8(0), tensor.shape))]
  return {
    name: LazyTensor(shape, tensor.dtype, lambda i=i: split(c, tensor.read())[i])
    for i, (name, shape) in enumerate(zip(names, shapes))
  }


def _converted(c: ModelConfig, architecture: Architecture, path: str, tensor: LazyTensor, reading: bool) -> LazyTensor:
  """`path`: of the (first) weight in it."""
  part, _, kind = path.removeprefix("blocks/attention/").rpartition("/")
  if architecture.interleaved and part in ("query", "key"):
    return _mapped(tensor, lambda x: halves(x.T, c.head_dim, inverse=not reading).T)
  if architecture.by_head and part == "query":
    shapes: list[Shape] = [(n * c.head_dim,) for n in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
    source, target = (ROWS, BY_HEAD) if reading else (BY_HEAD, ROWS)
    return _mapped(tensor, lambda x: target.write(c, source.read(c, x, shapes)))
  if architecture.norm_offset and kind == "scale":
    one = np.float32(-1 if reading else 1)
    return _mapped(tensor, lambda x: x.astype(np.float32) + one, np.dtype("float32"))
  if re.search(architecture.transposed, path):
    shape = (*tensor.shape[:-2], *tensor.shape[:-3:-1])
    return dataclasses.replace(_mapped(tensor, lambda x: x.swapaxes(-1, -2)), shape=shape)
  return tensor


def _mapped(tensor: LazyTensor, change: Callable, dtype: np.dtype | None = None) -> LazyTensor:
  return LazyTensor(tensor.shape, dtype or tensor.dtype, lambda: change(tensor.read()))

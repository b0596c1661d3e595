"""Reading checkpoints: of the newest step that is as it was written, all or a part."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxllm.base.errors import CheckpointError
from jaxllm.parallel.agreement import first_does, gather
from jaxllm.storage import manifest as manifests
from jaxllm.storage.leaves import describe, leaf_paths, nest, num_elements, unnest

log = logging.getLogger("jaxllm")
DATA = "data.json"


class StoredArray(NamedTuple):
  """What `read` returns has this shape and dtype; it is read when it is asked for."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def committed_steps(directory: str | os.PathLike) -> list[int]:
  """The committed steps under a run's checkpoints directory, oldest first."""
  places = Path(directory).glob(f"*/{manifests.NAME}")
  return sorted(int(place.parent.name) for place in places if place.parent.name.isdigit())


def restore_params(
  path: str | os.PathLike, abstract: Any = None, step: int | None = None, part: str = "params"
) -> tuple[int, Any]:
  """Loads one top-level part of the state, by default the weights, without reading the others.

  `path` is a run directory or its `checkpoints`. `abstract` is a pytree of leaves with shape, dtype and
  optionally sharding; another dtype converts. Without it the result is plain nested dicts as saved, on
  this process's first device. Returns (step, tree). Raises CheckpointError like `Checkpoints.restore`.
  """
  directory = Path(path).absolute()
  if (directory / "checkpoints").is_dir():
    directory = directory / "checkpoints"
  step, manifest = good_step(directory, step, part)
  saved = {name: leaf for name, leaf in manifest.tree.items() if name.split("/")[0] == part}
  if not saved:
    parts = sorted({name.split("/")[0] for name in manifest.tree})
    raise CheckpointError(f"checkpoint step {step} has no {part!r}; it has {', '.join(parts)}")
  if abstract is None:
    shapes = {p: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for p, leaf in saved.items()}
    return step, nest(load(directory / str(step), manifest, shapes))[part]
  wanted = {f"{part}/{name}": leaf for name, leaf in leaf_paths(abstract).items()}
  described = {name: describe(leaf) for name, leaf in wanted.items()}
  check_tree(manifest, saved, described, same_dtype=False)
  loaded = load(directory / str(step), manifest, wanted)
  return step, jax.tree.unflatten(jax.tree.structure(abstract), list(loaded.values()))


def open_params(path: str | os.PathLike, step: int | None = None) -> dict[str, StoredArray]:
  """The weights in a directory of checkpoints, of its newest good step or of `step`, by path; each is read when it is
  asked for.

  Raises CheckpointError like `Checkpoints.restore`.
  """
  directory = Path(path).absolute()
  step, manifest = good_step(directory, step, "params")
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  saved = {name: leaf for name, leaf in manifest.tree.items() if name.startswith("params/")}

  def array(name: str, leaf: dict) -> StoredArray:
    shape, dtype = tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])

    def read() -> np.ndarray:
      context = ocp.Context()
      context.pytree.loading.partial_load = True
      with context:
        wanted = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=here)}
        return np.asarray(load(directory / str(step), manifest, wanted)[name])

    return StoredArray(shape, dtype, read)

  return {name.removeprefix("params/"): array(name, leaf) for name, leaf in saved.items()}


def good_step(directory: Path, step: int | None, part: str | None = None) -> tuple[int, manifests.Manifest]:
  """The newest step whose files (those of one part of the state, or all) are as they were written.

  Every process checks its share of the files, and all go by what any of them found.
  """
  steps = first_does(lambda: committed_steps(directory))
  if not steps:
    raise CheckpointError(f"there is no complete checkpoint in {directory}")
  if step is not None and step not in steps:
    raise CheckpointError(f"there is no checkpoint step {step} in {directory}; there are {steps}")

  if step is None:
    for place in directory.iterdir():
      if place.name.isdigit() and int(place.name) > steps[-1]:
        log.warning(
          "checkpoint step %s has no %s: it is being saved, or was not to the end", place.name, manifests.NAME
        )

  def wanted(name: str) -> bool:
    return part is None or name.startswith(f"state/{part}/") or name.count("/") == 1

  damage = ""
  for candidate in [step] if step is not None else reversed(steps):
    place = directory / str(candidate)
    found, unreadable = None, False
    try:
      manifest = manifests.read(place)
      manifests.verify(place, manifest, wanted, (jax.process_index(), jax.process_count()))
    except manifests.DamagedError as caught:
      found = str(caught)
    except CheckpointError as caught:
      found, unreadable = str(caught), True
    told = gather([found, unreadable])
    error = next((each for each, _ in told if each), None)
    if error is None:
      if damage:
        log.warning("%s; using checkpoint step %d instead", damage, candidate)
      return candidate, manifest
    if reason := next((each for each, cannot in told if cannot), None):  # it may be whole: nothing else takes its place
      raise CheckpointError(f"{reason}; it is of checkpoint step {candidate}")
    damage = damage or f"checkpoint step {candidate} is damaged: {error}"
  raise CheckpointError(
    f"{damage}; choose another of the steps {steps}"
    if step is not None
    else f"{damage}; no good checkpoint is left in {directory}"
  )


def load(place: Path, manifest: manifests.Manifest, abstract: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Arrays for the leaf paths of `abstract`, in its order, dtypes and shardings."""

  def request(path: str) -> jax.ShapeDtypeStruct:
    leaf = abstract[path]
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if "impl" in manifest.tree[path]:
      data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
      return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

  requests = {path: request(path) for path in abstract}
  stored = {path: leaf for path, leaf in requests.items() if num_elements(leaf)}
  arrays = unnest(ocp.load_checkpointables(place / "state", nest(stored)), stored)
  for path, leaf in requests.items():
    if path not in arrays:  # nothing to store in an empty array
      arrays[path] = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    elif "impl" in manifest.tree[path]:
      arrays[path] = jax.random.wrap_key_data(arrays[path], impl=manifest.tree[path]["impl"])
  return {path: arrays[path] for path in abstract}


def check_tree(manifest: manifests.Manifest, saved: dict, wanted: dict, same_dtype: bool = True) -> None:
  """Raises CheckpointError naming the first leaf in which what is saved differs from what is wanted."""
  for path, leaf in wanted.items():
    if path not in saved:
      raise CheckpointError(
        f"checkpoint step {manifest.step} has no {path}; it was written by another model or optimizer"
      )
    for name in ("shape", "dtype") if same_dtype else ("shape",):
      if saved[path][name] != leaf[name]:
        raise CheckpointError(
          f"{path} has {name} {saved[path][name]} in checkpoint step {manifest.step} but {leaf[name]} here; "
          "the checkpoint was written by another model or optimizer"
        )
  for path in saved:
    if path not in wanted:
      raise CheckpointError(f"checkpoint step {manifest.step} has {path}, which this model or optimizer has not")

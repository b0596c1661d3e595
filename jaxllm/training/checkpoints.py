"""Checkpoints: saved in the background, hashed, and checked before they are trusted.

    <run>/checkpoints/<step>/state/<params, …>/   Orbax, one directory for each top-level part of the state
                             data.json            where the run was in its data, the same for any number of processes
                             manifest.json        written last: a step without it does not exist

Orbax does what it is good at: sharded arrays, from any mesh to any mesh, off the training thread. What a
step means (commit, verification, fallback, retention) is here. All processes must see one file system.
"""

import concurrent.futures
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxllm.errors import CheckpointError
from jaxllm.interop.tensors import LazyTensor, Tensors
from jaxllm.training import manifest as manifests
from jaxllm.training.config import CheckpointConfig
from jaxllm.training.files import write_atomically
from jaxllm.training.leaves import describe, leaf_paths, nest, num_elements, stored_form, unnest
from jaxllm.training.processes import everywhere

log = logging.getLogger("jaxllm")
DATA = "data.json"


class Restored(NamedTuple):
  step: int
  state: Any
  data_state: Any


class Checkpoints:
  """The checkpoints that one training run writes and resumes from; a context manager.

  Opening it removes what a killed run left unfinished, so only the run itself may; readers use
  `restore_params`. Every process of a multi-host run makes the same calls in the same order.
  """

  def __init__(self, directory: str | os.PathLike, config: CheckpointConfig):
    self.directory = Path(directory).absolute()
    self.config = config
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: tuple[int, concurrent.futures.Future] | None = None
    if jax.process_index() == 0:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._remove_unfinished()
    everywhere(True)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    try:
      self.close()
    except CheckpointError as failure:
      if kind is None:
        raise
      log.error("%s", failure)  # the error that ended the run is the one to report

  def steps(self) -> list[int]:
    """The committed steps, oldest first; a save still in flight is not among them."""
    return committed_steps(self.directory)

  def latest_step(self) -> int | None:
    return max(self.steps(), default=None)

  def save(self, step: int, state: Any, data_state: Any = None, metrics: Mapping[str, float] | None = None) -> None:
    """Saves `state` (a pytree of arrays), `data_state` (JSON, the same on all processes) and `metrics`.

    Returns when the arrays are safe from donation, before they are on disk, unless the config says
    otherwise. A save still in flight is waited for, and its failure raised. Later steps on disk belong to
    a course that this save abandons (someone restored an earlier step), and go when it commits.
    Raises CheckpointError when the disk is full or not writable; earlier steps stay as they are.
    """
    self.wait()
    leaves = leaf_paths(state)
    place = self.directory / str(step)
    error = None
    try:
      if jax.process_index() == 0 and place.exists():
        place.rename(_aside(place))
    except OSError as e:
      error = e
    if not everywhere(error is None):
      self._fail(step, error)
    try:
      place.mkdir(exist_ok=True)
      if jax.process_index() == 0:
        write_atomically(place / DATA, json.dumps(data_state))
      # Directories made in the background turn any early error into a wait of ten minutes (0.12.8).
      context = ocp.Context()
      context.asynchronous.create_directories_asynchronously = False
      with context:
        response = ocp.save_checkpointables_async(
          place / "state",
          nest({path: stored_form(leaf) for path, leaf in leaves.items() if num_elements(leaf)}),
        )
    except (OSError, ValueError) as e:
      self._fail(step, e)
    tree = {path: describe(leaf) for path, leaf in leaves.items()}
    self._pending = step, self._pool.submit(self._commit, step, response, dict(metrics or {}), tree)
    if not self.config.asynchronous:
      self.wait()

  def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
    """Loads the newest good step, or exactly `step`, as (step, state, data_state).

    `abstract_state` is a pytree like the saved one whose leaves have shape, dtype and, optionally,
    sharding (`jax.ShapeDtypeStruct`); the mesh may differ from the one that saved. A damaged step is
    skipped with a warning, unless it was asked for. Raises CheckpointError when nothing good is left, or
    naming the first leaf that is missing or has another shape or dtype.
    """
    self.wait()
    step, manifest = _good_step(self.directory, step)
    abstract = leaf_paths(abstract_state)
    _check_tree(manifest, manifest.tree, {path: describe(leaf) for path, leaf in abstract.items()})
    place = self.directory / str(step)
    loaded = _load(place, manifest, abstract)
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), list(loaded.values()))
    return Restored(step, state, json.loads((place / DATA).read_text()))

  def wait(self) -> None:
    """Returns when the save in flight is committed; raises CheckpointError if it failed."""
    if self._pending is None:
      return
    (step, future), self._pending = self._pending, None
    error = future.exception()
    if not everywhere(error is None):
      self._fail(step, error)

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._pool.shutdown()

  def _commit(self, step: int, response: Any, metrics: dict, tree: dict) -> None:
    response.result()  # ends with a barrier: all processes have written
    if jax.process_index() == 0:
      manifests.write(self.directory / str(step), step, metrics, tree)
      self._remove_superseded(step)

  def _remove_superseded(self, newest: int) -> None:
    shutil.rmtree(_aside(self.directory / str(newest)), ignore_errors=True)
    scores = {}
    for step in self.steps():
      try:
        scores[step] = manifests.read(self.directory / str(step)).metrics.get(self.config.best_metric)
      except manifests.DamagedError:
        scores[step] = None
    keep = steps_to_keep(scores, newest, self.config)
    for step in scores.keys() - keep:
      place = self.directory / str(step)
      (place / manifests.NAME).unlink()  # uncommitted first: a half-deleted step must not look whole
      shutil.rmtree(place)

  def _remove_unfinished(self) -> None:
    for place in list(self.directory.iterdir()):
      if re.fullmatch(r"\d+", place.name) and not (place / manifests.NAME).exists():
        shutil.rmtree(place)
    for old in list(self.directory.glob("*.replaced")):
      if old.with_suffix("").exists():
        shutil.rmtree(old)
      else:
        old.rename(old.with_suffix(""))

  def _fail(self, step: int, error: BaseException | None) -> None:
    """Removes what there is of `step` and raises what is to be said about it."""
    if jax.process_index() == 0:
      self._remove_unfinished()
    reason = _disk_trouble(error) if error else "another process failed"
    if reason is None:
      raise error
    last = self.latest_step()
    raise CheckpointError(
      f"{reason} while saving step {step} under {self.directory}; "
      + ("there is no earlier checkpoint" if last is None else f"the last good checkpoint is step {last}")
    ) from error


def committed_steps(directory: str | os.PathLike) -> list[int]:
  """The committed steps under a run's checkpoints directory, oldest first."""
  places = Path(directory).glob(f"*/{manifests.NAME}")
  return sorted(int(place.parent.name) for place in places if place.parent.name.isdigit())


def steps_to_keep(scores: Mapping[int, float | None], newest: int, config: CheckpointConfig) -> set[int]:
  """Which of the steps (keys; values are the best metric, lower is better) survive after saving `newest`."""
  steps = sorted(step for step in scores if step <= newest)
  keep = {newest, *steps[len(steps) - config.keep_last :]}
  ranked = sorted((scores[s], -s) for s in steps if scores[s] is not None and math.isfinite(scores[s]))
  keep |= {-negative for _, negative in ranked[: config.keep_best]}
  if config.keep_every:
    keep |= {step for step in steps if step % config.keep_every == 0}
  return keep


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
  step, manifest = _good_step(directory, step, part)
  saved = {name: leaf for name, leaf in manifest.tree.items() if name.split("/")[0] == part}
  if not saved:
    parts = sorted({name.split("/")[0] for name in manifest.tree})
    raise CheckpointError(f"checkpoint step {step} has no {part!r}; it has {', '.join(parts)}")
  if abstract is None:
    shapes = {p: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for p, leaf in saved.items()}
    return step, nest(_load(directory / str(step), manifest, shapes))[part]
  wanted = {f"{part}/{name}": leaf for name, leaf in leaf_paths(abstract).items()}
  described = {name: describe(leaf) for name, leaf in wanted.items()}
  _check_tree(manifest, saved, described, same_dtype=False)
  loaded = _load(directory / str(step), manifest, wanted)
  return step, jax.tree.unflatten(jax.tree.structure(abstract), list(loaded.values()))


def open_params(path: str | os.PathLike, step: int | None = None) -> Tensors:
  """The weights of a run's newest good step, or of `step`, by path; each is read when it is asked for.

  Raises CheckpointError like `Checkpoints.restore`.
  """
  directory = Path(path).absolute() / "checkpoints"
  step, manifest = _good_step(directory, step, "params")
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  saved = {name: leaf for name, leaf in manifest.tree.items() if name.startswith("params/")}

  def tensor(name: str, leaf: dict) -> LazyTensor:
    shape, dtype = tuple(leaf["shape"]), jnp.dtype(leaf["dtype"])

    def read() -> np.ndarray:
      context = ocp.Context()
      context.pytree.loading.partial_load = True
      with context:
        wanted = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=here)}
        return np.asarray(_load(directory / str(step), manifest, wanted)[name])

    return LazyTensor(shape, dtype, read)

  return {name.removeprefix("params/"): tensor(name, leaf) for name, leaf in saved.items()}


def _good_step(directory: Path, step: int | None, part: str | None = None) -> tuple[int, manifests.Manifest]:
  """The newest step whose files (those of one part of the state, or all) are as they were written."""
  steps = committed_steps(directory)
  if not steps:
    raise CheckpointError(f"there is no complete checkpoint in {directory}")
  if step is not None and step not in steps:
    raise CheckpointError(f"there is no checkpoint step {step} in {directory}; there are {steps}")

  def wanted(name: str) -> bool:
    return part is None or name.startswith(f"state/{part}/") or name.count("/") == 1

  damage = ""
  for candidate in [step] if step is not None else reversed(steps):
    place = directory / str(candidate)
    error = None
    try:
      manifest = manifests.read(place)
      manifests.verify(place, manifest, wanted, (jax.process_index(), jax.process_count()))
    except manifests.DamagedError as e:
      error = e
    if everywhere(error is None):
      if damage:
        log.warning("%s; using checkpoint step %d instead", damage, candidate)
      return candidate, manifest
    damage = damage or f"checkpoint step {candidate} is damaged: {error or 'another process found it so'}"
  raise CheckpointError(
    f"{damage}; choose another of the steps {steps}"
    if step is not None
    else f"{damage}; no good checkpoint is left in {directory}"
  )


def _load(place: Path, manifest: manifests.Manifest, abstract: Mapping[str, Any]) -> dict[str, jax.Array]:
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


def _check_tree(manifest: manifests.Manifest, saved: dict, wanted: dict, same_dtype: bool = True) -> None:
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


def _aside(place: Path) -> Path:
  return place.with_name(place.name + ".replaced")


def _disk_trouble(error: BaseException) -> str | None:
  """What to say of an error of the file system; None if it is something else (a bug of ours)."""
  number = error.errno if isinstance(error, OSError) else None
  if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's errors are ValueErrors
    number = int(found[1])
  if number is None:
    return None
  if number in (errno.ENOSPC, errno.EDQUOT):
    return "disk full"
  return f"cannot write ({os.strerror(number).lower()})"
